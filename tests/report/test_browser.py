"""The report page in Chromium, from a file and with the network off: what a reader sees, clicks and types."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lidnet_fast.report import Arm, Column, Panel, Report, write_report
from lidnet_fast.report.images import DIVERGING

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)

ARMS = ("low dose", "other tool", "LIDnet", "normal dose")
SHAPE = (64, 80)
WINDOW = (-1000.0, 400.0)
BOXES = (np.array([[30, 20, 42, 30], [60, 40, 70, 52]]), np.zeros((0, 4)), np.array([[5, 5, 14, 16]]))


@pytest.fixture(scope="module")
def images() -> list[dict[str, np.ndarray]]:
    """HU of every panel, beyond every window, and with values that lie halfway between two grey values."""
    rng = np.random.default_rng(0)
    return [{name: rng.integers(-1100, 3100, SHAPE).astype(np.float32) for name in ARMS} for _ in BOXES]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, images: list[dict[str, np.ndarray]]) -> Path:
    columns = [Column(f"m{n}", f"measure {n}", ".3f", group="a wide table") for n in range(14)]
    arms = [Arm(name, {c.key: (0.5 + n, 0.4, 9.0) for c in columns}) for n, name in enumerate(ARMS)]
    panels = [
        Panel(f"Sample {n}", shown, boxes, {"LIDnet": [((1, 1, 9, 9), 0.9)]}, {}, ("LIDnet", "normal dose"))
        for n, (shown, boxes) in enumerate(zip(images, BOXES, strict=True), 1)
    ]
    arms[2] = Arm("LIDnet", arms[2].metrics, highlight=True)
    report = Report("A report", "Of noise.", columns, arms, panels=panels, window=WINDOW, config="k: " + 300 * "v")
    return write_report(tmp_path_factory.mktemp("report") / "report.html", report)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run hide-scrollbars"
    for switch in (
        *switches.split(),
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: "webdriver.Chrome", page: Path) -> Iterator["webdriver.Chrome"]:
    """The page, freshly loaded at 1280 x 900; at the end, its console is empty."""
    resize(chromium, 1280)
    chromium.get(page.as_uri())
    WebDriverWait(chromium, 20).until(lambda d: d.find_elements(By.CSS_SELECTOR, ".room[data-ready]"))
    yield chromium
    # Chromium remarks on the test's own reading of canvases.
    assert [entry for entry in chromium.get_log("browser") if "getImageData" not in entry["message"]] == []


def resize(driver: "webdriver.Chrome", width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def press(driver: "webdriver.Chrome", key: str) -> None:
    ActionChains(driver).send_keys(key).perform()


def tool(driver: "webdriver.Chrome", name: str):
    return driver.find_element(By.CSS_SELECTOR, f"[data-tool={name}]")


def slide(driver: "webdriver.Chrome", name: str, value: float) -> None:
    change = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    driver.execute_script(change, tool(driver, name), value)


def pixels(driver: "webdriver.Chrome", panel: int, column: int, view: int = 0) -> np.ndarray:
    """A canvas after the next repaint, [H,W,3]."""
    read = """const [panel, column, view, done] = arguments;
        requestAnimationFrame(() => requestAnimationFrame(() => {
            const strip = document.querySelectorAll(".strip")[panel];
            const canvas = strip.querySelectorAll(".ct")[column].querySelectorAll("canvas")[view];
            const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            done([image.height, image.width, ...image.data]);
        }))"""
    height, width, *values = driver.execute_async_script(read, panel, column, view)
    return np.array(values).reshape(height, width, 4)[..., :3]


def grey(hu: np.ndarray, level: float, width: float) -> np.ndarray:
    scaled = np.clip((hu.astype(np.float64) - (level - width / 2)) / width, 0, 1) * 255
    return scaled.round().astype(int)[..., None].repeat(3, 2)


def focused(driver: "webdriver.Chrome") -> tuple[str, str, str]:
    """Title of the panel, column and label of the picture that have the focus."""
    read = """const view = document.activeElement;
        return [view.closest(".panel").querySelector("h3").textContent, view.closest(".ct").dataset.name,
                view.querySelector("canvas").getAttribute("aria-label")]"""
    return tuple(driver.execute_script(read))


def test_windows_show_the_hu_values_of_every_panel(browser, images) -> None:
    low, high = WINDOW
    assert np.array_equal(pixels(browser, 0, 2), grey(images[0]["LIDnet"], (low + high) / 2, high - low))
    press(browser, "2")  # the second preset: lung
    for panel, shown in enumerate(images):
        for column, name in enumerate(ARMS):
            assert np.array_equal(pixels(browser, panel, column), grey(shown[name], -600, 1500)), (panel, name)
    slide(browser, "level", 50)
    slide(browser, "width", 510)  # two HU per grey value: every other one is a tie of the rounding
    assert np.array_equal(pixels(browser, 1, 0), grey(images[1]["low dose"], 50, 510))
    crop = browser.find_elements(By.CSS_SELECTOR, ".view.zoom")[1]
    x, y = (int(crop.get_attribute(f"data-{axis}")) for axis in "xy")
    part = pixels(browser, 0, 0, 2)
    whole = grey(images[0]["low dose"], 50, 510)
    assert np.array_equal(part, whole[y : y + part.shape[0], x : x + part.shape[1]])
    assert tool(browser, "preset").get_attribute("value") == ""


def test_drag_changes_level_and_width_and_does_not_enlarge(browser, images) -> None:
    view = browser.find_element(By.CSS_SELECTOR, ".view.full")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", view)
    ActionChains(browser).move_to_element(view).click_and_hold().move_by_offset(25, -10).release().perform()
    assert np.array_equal(pixels(browser, 0, 1), grey(images[0]["other tool"], -300 - 20, 1400 + 100))
    assert browser.find_elements(By.CSS_SELECTOR, "dialog[open]") == []
    pixel = view.size["width"] / SHAPE[1]
    ActionChains(browser).move_to_element_with_offset(view, *[round(1.5 * pixel)] * 2).perform()
    row, column = SHAPE[0] // 2 + 1, SHAPE[1] // 2 + 1
    text = tool(browser, "readout").text.replace("\N{MINUS SIGN}", "-")
    assert text == f"{images[0]['low dose'][row, column]:.0f} HU at ({column}, {row})"


def test_differences_of_any_column_on_any_scale(browser, images) -> None:
    slide(browser, "limit", 7)
    browser.execute_script(
        "arguments[0].value = 'other tool'; arguments[0].dispatchEvent(new Event('input'))", tool(browser, "minuend")
    )
    difference = images[2]["other tool"].astype(np.float64) - images[2]["normal dose"]
    channels = np.array(list(DIVERGING.values())).T
    expected = np.stack([np.interp(difference / 1000, list(DIVERGING), c) for c in channels], -1)
    assert tool(browser, "limit-text").text == "\N{PLUS-MINUS SIGN}1000 HU"
    assert np.abs(pixels(browser, 2, 4) - expected).max() <= 0.5
    assert browser.find_elements(By.CSS_SELECTOR, ".ct b")[-1].text == "other tool \N{MINUS SIGN} normal dose"


def test_keyboard_goes_through_the_lesions(browser) -> None:
    places = []
    for key in (Keys.ARROW_RIGHT, "j", "j", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, "k", Keys.ARROW_LEFT):
        press(browser, key)
        places.append(focused(browser))
    lesions = [
        ("Sample 1", "LIDnet", "LIDnet, lesion 1"),
        ("Sample 1", "LIDnet", "LIDnet, lesion 2"),
        ("Sample 2", "LIDnet", "LIDnet"),  # has none: the slice itself
        ("Sample 3", "LIDnet", "LIDnet, lesion 1"),
    ]
    assert places == [*lesions, lesions[0], lesions[3], lesions[2]]
    assert tool(browser, "position").text == "3 of 4: Sample 2"
    in_sight = (
        "const box = document.activeElement.getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight"
    )
    WebDriverWait(browser, 5).until(lambda d: d.execute_script(in_sight))
    assert browser.execute_script("return document.activeElement.matches(':focus-visible')")


def test_arrows_belong_to_a_slider_that_has_the_focus(browser) -> None:
    browser.execute_script("arguments[0].focus()", tool(browser, "level"))
    press(browser, Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == tool(browser, "level")
    assert float(tool(browser, "level").get_attribute("value")) > -300


def test_b_hides_and_shows_the_boxes(browser) -> None:
    def visible() -> int:
        boxes = browser.find_elements(By.CSS_SELECTOR, ".view .lesion, .view .found")
        return sum(box.value_of_css_property("display") != "none" for box in boxes)

    before = visible()
    assert before > 0
    press(browser, "b")
    assert visible() == 0
    press(browser, "b")
    assert visible() == before


def test_large_view_by_keyboard(browser, images) -> None:
    press(browser, "j")
    press(browser, Keys.ENTER)
    press(browser, Keys.ARROW_RIGHT)  # from LIDnet to the normal dose
    press(browser, "j")
    press(browser, "3")  # soft tissue
    dialog = browser.find_element(By.CSS_SELECTOR, "dialog[open]")
    assert dialog.find_element(By.CSS_SELECTOR, "[aria-pressed=true]").text == "normal dose"
    assert dialog.find_element(By.CSS_SELECTOR, "canvas").get_attribute("aria-label") == "normal dose, lesion 2"
    large = browser.execute_async_script(
        """const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => {
        const canvas = document.querySelector("dialog canvas");
        done([...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]); }))"""
    )
    assert np.array_equal(np.reshape(large, (36, 36, 4))[..., :3], pixels(browser, 0, 3, 2))
    press(browser, Keys.ESCAPE)
    # The focus moves when the dialog's "close" event has been dispatched.
    WebDriverWait(browser, 5).until(lambda d: focused(d) == ("Sample 1", "normal dose", "normal dose, lesion 2"))


def test_nothing_widens_the_page_on_a_phone(browser) -> None:
    resize(browser, 390)
    browser.find_elements(By.CSS_SELECTOR, "summary")[-1].click()  # the configuration, with a very long line
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    table = browser.find_element(By.CSS_SELECTOR, ".scroll")
    assert browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", table)


def test_without_scripts_there_are_pictures_and_no_tools(chromium, page) -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(page.as_uri())
        pictures = chromium.find_elements(By.CSS_SELECTOR, ".view img")
        assert len(pictures) == 5 * (3 + 1 + 2)
        assert all(picture.is_displayed() for picture in pictures)
        assert not chromium.find_element(By.CSS_SELECTOR, ".tools").is_displayed()
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})

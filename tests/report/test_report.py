"""The report page: what it holds, what it refuses, and that it needs nothing but itself."""

import base64
import io
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lidnet_fast.report import Arm, Column, Curve, Forest, Panel, Report, ScoreMaps, write_report
from lidnet_fast.report.charts import condense, forest_chart, froc_chart, linear_axis, log_axis, tradeoff_chart
from lidnet_fast.report.images import difference_limit, difference_png, gray_png, lesion_crop, packed_hu
from lidnet_fast.report.page import ArmStyle, best_texts, format_metric, render

VOID = {"meta", "img", "input", "link", "br", "hr"}
SHAPE = (64, 80)


class Page(HTMLParser):
    """Parses a page, insists on balanced tags, and keeps its attributes and the text of some elements."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for tag in self.open:
            self.texts.setdefault(tag, []).append(data)

    def text(self, tag: str) -> str:
        return "".join(self.texts.get(tag, []))

    def count(self, css_class: str) -> int:
        return sum(css_class in (attrs.get("class") or "").split() for _, attrs in self.tags)


def make_panel(**changes) -> Panel:
    rng = np.random.default_rng(0)
    normal = np.full(SHAPE, -800.0, np.float32)
    normal[20:30, 30:42] = 40
    names = ("low dose", "MSE", "LIDnet")
    images = {name: normal + rng.normal(0, sd, SHAPE) for name, sd in zip(names, (200, 40, 30), strict=True)}
    settings = {
        "title": "Patient 7, slice 3",
        "images": images | {"normal dose": normal},
        "boxes": np.array([[30, 20, 42, 30]], np.float32),
        "detections": {"LIDnet": [((29, 20, 42, 31), 0.87), ((1, 1, 9, 9), 0.11)], "MSE": []},
        "captions": {"MSE": "28.6 dB"},
        "difference": ("LIDnet", "normal dose"),
    }
    return Panel(**(settings | changes))


def make_report(**changes) -> Report:
    columns = [
        Column("psnr", "PSNR", ".2f", "dB", group="whole image", help="Peak signal-to-noise ratio."),
        Column("rmse", "RMSE", ".1f", "HU", higher_is_better=False, group="whole image"),
        Column("ap", "AP@0.5", ".3f", help="Average precision."),
    ]
    arms = [
        Arm("low dose", {"psnr": 17.4, "rmse": 188.0, "ap": 0.301}, reference=True),
        Arm("MSE", {"psnr": (28.62, 28.5, 28.7), "rmse": 51.9, "ap": (0.648, 0.63, 0.66)}),
        Arm("LIDnet", {"psnr": (28.40, 28.3, 28.5), "rmse": 53.2, "ap": (0.771, 0.75, 0.79)}, highlight=True),
        Arm("normal dose", {"psnr": None, "ap": 0.923}, reference=True),
    ]
    steps = np.arange(500)
    losses = {"classification": (steps, np.exp(-steps / 100.0)), "boxes": (steps[:20], np.linspace(1, 0, 20))}
    settings = {
        "title": "Demo",
        "summary": "What was measured.",
        "columns": columns,
        "arms": arms,
        "tradeoffs": [("psnr", "ap")],
        "panels": [make_panel()],
        "curves": [Curve("Detector loss", "step", "loss", losses)],
        "froc": {"MSE": ([0.0, 0.5, 3.0], [0.0, 0.5, 0.7]), "LIDnet": ([0.0, 0.4, 2.0], [0.0, 0.7, 0.8])},
        "facts": {"machine": "2 cores", "Seconds": {"detector": 75.4, "resumed": False, "peak memory": None}},
        "config": "seed: 0\n",
    }
    return Report(**(settings | changes))


def test_page_is_one_well_formed_file(tmp_path: Path) -> None:
    path = write_report(tmp_path / "runs" / "demo" / "report.html", make_report())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not re.search(r"https?://", html)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    for tag, attrs in page.tags:
        assert tag not in {"link", "iframe", "object", "base"}
        assert (attrs.get("src") or "data:").startswith("data:")
        assert "href" not in attrs
    assert all(name in page.text("tbody") for name in ("low dose", "MSE", "LIDnet", "normal dose"))
    assert page.text("h1") == "Demo"
    assert page.text("pre") == "seed: 0\n"
    for word in ("75.4", "2 cores", "resumedno", "peak memory\N{EN DASH}"):
        assert word in page.text("dl")


def test_page_without_optional_parts() -> None:
    page = Page(render(make_report(tradeoffs=(), panels=(), curves=(), froc={}, facts={}, config="")))
    assert page.text("h2") == "Results"


def test_all_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>&\"'"
    images = {evil: np.zeros(SHAPE), "b": np.ones(SHAPE)}
    finding = {evil: [((1, 1, 5, 5), 0.9)]}
    panel = Panel(evil, images, detections=finding, captions={evil: evil}, difference=(evil, "b"))
    report = make_report(
        title=evil,
        summary=evil,
        columns=[Column("a", evil, unit=evil, help=evil, group=evil), Column("b", evil, help=evil)],
        arms=[Arm(evil, {"a": 1.0, "b": 2.0}, note=evil), Arm("r" + evil, {"b": 2.0}, reference=True)],
        tradeoffs=[("a", "b")],
        panels=[panel],
        curves=[Curve(evil, evil, evil, {evil: ([1, 2], [1, 2])})],
        froc={evil: ([0.0, 1.0], [0.0, 1.0])},
        facts={evil: evil, "group" + evil: {evil: evil}},
        config=evil,
    )
    html = render(report)
    page = Page(html)
    assert "<script>alert" not in html
    assert [tag for tag, _ in page.tags].count("script") == 1
    for tag in ("h1", "th", "h3", "text", "figcaption", "dd", "pre", "li", "title"):
        assert evil in page.text(tag), tag


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path / "report.html", make_report())
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, make_report(title="Another"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_table_marks_the_best_trained_arm_and_ties() -> None:
    report = make_report()
    assert best_texts(report) == {"psnr": "28.62", "rmse": "51.9", "ap": "0.771"}
    tied = [*report.arms, Arm("tie", {"ap": 0.7714})]
    assert Page(render(replace(report, arms=tied))).text("b").count("0.771") == 2
    single = replace(report, arms=[report.arms[1], report.arms[0]], froc={})
    assert best_texts(single) == {}
    assert Page(render(report)).count("highlight") == 1
    assert Page(render(report)).count("reference") == 2


@pytest.mark.parametrize(
    ("value", "specification", "expected"),
    [
        (28.4049, ".2f", ("28.40", "")),
        (-3.0, ".1f", ("\N{MINUS SIGN}3.0", "")),
        (None, ".2f", ("\N{EN DASH}", "")),
        (float("nan"), ".2f", ("\N{EN DASH}", "")),
        (float("inf"), ".2f", ("\N{INFINITY}", "")),
        ((0.771, 0.75, 0.79), ".3f", ("0.771", "0.750\N{EN DASH}0.790")),
        ((0.5, 0.5, 0.5), ".3f", ("0.500", "")),
        ((-1.0, -3.0, 1.0), "+.1f", ("\N{MINUS SIGN}1.0", "\N{MINUS SIGN}3.0 to +1.0")),
        ((0.5, float("nan"), float("nan")), ".3f", ("0.500", "")),
    ],
)
def test_metric_format(value, specification, expected) -> None:
    assert format_metric(value, Column("k", "K", specification)) == expected


def test_panel_columns_overlays_and_crops() -> None:
    page = Page(render(make_report()))
    views = [attrs for tag, attrs in page.tags if "view" in (attrs.get("class") or "").split()]
    assert len(views) == 5 * 2  # four images and their difference; each whole and magnified
    assert page.count("zoom") == 5
    assert page.count("lesion") == 5 * 2
    assert page.count("found") - 1 == 2 + 1  # beside the key: two on the slice, one of them inside the crop
    scores = sorted(float(attrs["data-score"] or 0) for _, attrs in page.tags if "data-score" in attrs)
    assert scores == [0.11, 0.87, 0.87]
    rectangle = next(attrs for tag, attrs in page.tags if tag == "rect" and attrs["class"] == "lesion")
    assert [rectangle[key] for key in ("x", "y", "width", "height")] == ["37.500%", "31.250%", "15.000%", "15.625%"]
    assert "LIDnet \N{MINUS SIGN} normal dose" in page.text("figcaption")


def decode(uri: str) -> Image.Image:
    prefix, data = uri.split(",")
    assert prefix == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_maps_are_a_table_of_cases_and_arms() -> None:
    scores = np.zeros((8, 6))
    scores[1, 2], scores[6, 3] = 9, -9
    maps = ScoreMaps("Inventions <b>", "In deviations.", 4.5, {"case 1": {"MSE": scores, "LIDnet": -scores}})
    page = Page(render(make_report(maps=[maps])))
    pictures = [attrs for tag, attrs in page.tags if tag == "img" and (attrs["alt"] or "").endswith("case 1")]
    assert [attrs["alt"] for attrs in pictures] == ["MSE, case 1", "LIDnet, case 1"]
    assert "Inventions <b>" in page.text("h2")
    assert pictures[0]["src"] == difference_png(scores, 4.5)


def test_gray_png_spans_the_window() -> None:
    picture = decode(gray_png([[-2000, -1000, -300], [400, 900, -300]], (-1000, 400)))
    assert picture.mode == "L"
    assert np.array_equal(picture, [[0, 0, 128], [255, 255, 128]])


def test_packed_hu_is_lossless() -> None:
    hu = np.array([[-32768, -1024, -1], [0, 255, 256], [3071, 32767, 40]], np.float32)
    low, high = np.split(np.frombuffer(zlib.decompress(base64.b64decode(packed_hu(hu + 0.3))), np.uint8), 2)
    assert np.array_equal((high.astype(np.int16) << 8 | low).reshape(3, 3), hu)


def test_difference_png_is_blue_below_and_orange_above() -> None:
    picture = np.asarray(decode(difference_png([[-100, 0, 100, 1000]], 100)).convert("RGB")).astype(int)
    (low_r, _, low_b), zero, (high_r, _, high_b), beyond = picture[0]
    assert low_b > low_r + 50 and high_r > high_b + 50
    assert zero.max() < 30
    assert np.array_equal(beyond, picture[0, 2])


def test_difference_limit_is_round_and_covers_the_bulk() -> None:
    assert difference_limit([]) == 1
    assert difference_limit([np.zeros((4, 4), np.float32)]) == 1
    assert difference_limit([np.full((4, 4), -130, np.float32), np.full((4, 4), 20, np.float32)]) == 200


@pytest.mark.parametrize("box", [(30, 20, 42, 30), (0, 0, 4, 4), (70, 55, 80, 64), (0, 0, 80, 64)])
def test_lesion_crop_lies_inside_and_holds_the_box(box) -> None:
    x, y, side = lesion_crop(box, SHAPE)
    assert x >= 0 and x + side <= SHAPE[1] and y >= 0 and y + side <= SHAPE[0]
    if max(box[2] - box[0], box[3] - box[1]) <= side:
        assert x <= box[0] and box[2] <= x + side and y <= box[1] and box[3] <= y + side


@pytest.mark.parametrize("values", [(0.0, 1.0), (28.31, 28.7), (-3.0, 2.0), (5.0, 5.0), (0.0, 0.0), (1e-7, 3e-7)])
def test_linear_axis_covers_its_values(values) -> None:
    axis = linear_axis(np.array(values), 10, 110)
    assert axis.low <= min(values) and axis.high >= max(values)
    assert 3 <= len(axis.ticks) <= 9
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)
    assert np.allclose(axis([axis.low, axis.high]), [10, 110])


@pytest.mark.parametrize("values", [(0.013, 0.9), (1e-6, 1e3), (0.1, 0.1), (2.0, 2.5)])
def test_log_axis_covers_its_values(values) -> None:
    axis = log_axis(np.array(values), 0, 100)
    assert axis.low <= min(values) and axis.high >= max(values)
    assert 2 <= len(axis.ticks) <= 10
    assert np.allclose(axis(np.sqrt(axis.low * axis.high)), 50)


def test_long_series_become_means_with_a_band() -> None:
    x = np.arange(640.0)
    short = condense(x[:100], x[:100])
    assert short[0].size == 100 and short[2] is None
    mean_x, mean_y, band = condense(x, np.tile([0.0, 10.0], 320))
    assert mean_x[0] == 4.5 and np.allclose(mean_y, 5)
    assert band is not None and band.shape == (2, 64) and np.allclose(band.T, [0, 10])


def polylines(svg: str) -> list[np.ndarray]:
    found = re.findall(r'<polyline points="([^"]*)"', svg)
    return [np.array([[float(v) for v in pair.split(",")] for pair in points.split()]) for points in found]


def test_froc_is_clipped_to_its_axis_and_held() -> None:
    (points,) = polylines(froc_chart({"a": ([0.0, 0.25, 1.0], [0.0, 0.5, 0.8])}, ArmStyle([])))
    assert np.allclose(points[:, 0], np.interp([-3, -2, 0, 3], [-3, 3], [46, 428]), atol=0.1)
    assert np.allclose(points[:, 1], 246 - 220 * np.array([0.25, 0.5, 0.8, 0.8]), atol=0.1)


def test_curve_leaves_out_what_cannot_be_drawn() -> None:
    values = [1.0, float("nan"), 0.0, 0.1]
    curve = Curve("c", "step", "loss", {"a": ([1, 2, 3, 4], values), "empty": ([], [])}, log_y=True)
    html = render(make_report(curves=[curve], froc={}))
    (points,) = polylines(html)
    assert len(points) == 2
    assert "No data" in render(make_report(curves=[Curve("c", "x", "y", {"e": ([], [])})]))


def test_tradeoff_shows_trained_arms_and_names_what_is_off_scale() -> None:
    report = make_report()
    svg = tradeoff_chart(report, "psnr", "ap", ArmStyle(report.arms))
    assert svg.count("<circle") == 2
    assert "Off the scale: low dose 0.301, normal dose 0.923." in svg


def test_tradeoff_without_interval_or_points() -> None:
    nan = float("nan")
    arms = [Arm("MSE", {"psnr": 28.6, "ap": (0.6, nan, nan)}), Arm("LIDnet", {"psnr": 28.4, "ap": (0.7, 0.6, 0.8)})]
    svg = tradeoff_chart(make_report(arms=arms), "psnr", "ap", ArmStyle(arms))
    assert svg.count("<circle") == 2 and "nan" not in svg
    arms = [Arm("MSE", {"psnr": nan, "ap": 0.6}), Arm("LIDnet", {"ap": 0.7})]
    assert "No data" in tradeoff_chart(make_report(arms=arms), "psnr", "ap", ArmStyle(arms))


def test_forest_draws_intervals_to_scale_around_zero() -> None:
    rows = {"frozen judge": {"LIDnet": (0.2, 0.1, 0.3), "MSE": -0.1}, "other judge": {"LIDnet": None}}
    style = ArmStyle(make_report().arms)
    figure = Page(forest_chart(Forest("Gains", "AP@0.5", "", rows), style))
    dots = [float(attrs["cx"]) for tag, attrs in figure.tags if tag == "circle"]
    (zero,) = [float(attrs["x1"]) for tag, attrs in figure.tags if attrs.get("class") == "axis"]
    bars = [attrs["d"] for tag, attrs in figure.tags if attrs.get("class") == "bar"]
    left, right = (float(x) for x in re.findall(r"[MH]([\d.]+)", bars[0]))
    assert len(dots) == 2
    assert dots[1] < zero < left < dots[0] < right
    assert (dots[0] - zero) == pytest.approx(2 * (zero - dots[1]), abs=0.3)
    assert (right - left) == pytest.approx(dots[0] - zero, abs=0.3)
    assert {"LIDnet", "frozen judge", "other judge"} <= set(figure.texts["text"])
    page = render(make_report(forests=[Forest("Gains", "AP@0.5", "", rows)]))
    assert "<h2>Gains</h2>" in page
    assert "No data" in forest_chart(Forest("Gains", "AP@0.5", "", {"judge": {"LIDnet": None}}), style)


def test_colours_are_one_per_arm_and_kept_from_other_series() -> None:
    style = ArmStyle(make_report().arms)
    classes = [style(name) for name in ("low dose", "MSE", "LIDnet", "normal dose")]
    assert classes == ["low", "s0", "lid", "normal"]
    among = style.among(["MSE", "loss a", "loss b"])
    assert len({among(name) for name in ("MSE", "loss a", "loss b")}) == 3
    assert style.among(["loss"])("loss") == "plain"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_report(arms=[]), "arms: empty"),
        (lambda: make_report(columns=[]), "columns: empty"),
        (lambda: make_report(arms=[Arm("a", {}), Arm("a", {})]), "arms: 'a' appears more than once"),
        (lambda: make_report(arms=[Arm("a", {"psrn": 1.0})], froc={}), "arm 'a': metric 'psrn' is not one of psnr"),
        (lambda: make_report(tradeoffs=[("psnr", "x")]), "tradeoffs: column 'x'"),
        (lambda: make_report(froc={"nobody": ([0], [0])}), "froc: arm 'nobody'"),
        (lambda: make_report(froc={"MSE": ([1, 0], [0, 1])}), "froc of 'MSE'.*increasing"),
        (lambda: make_report(window=(400, -1000)), r"window: \(400, -1000\)"),
        (lambda: make_report(score_threshold=float("nan")), "score_threshold: nan"),
        (lambda: Arm("a", {"k": (1.0, 2.0, 3.0)}), "arm 'a': 'k'.*low <= mean <= high"),
        (lambda: Column("k", "K", "%.2f"), "column 'k': '%.2f'"),
        (lambda: Curve("c", "x", "y", {"s": ([1, 2], [1])}), r"curve 'c', series 's': x has shape \(2,\) and y \(1,\)"),
        (lambda: make_panel(images={}), "panel 'Patient 7, slice 3': no images"),
        (lambda: Panel("p", {"a": np.zeros((4, 4)), "b": np.zeros((4, 5))}), r"'b' has shape \(4, 5\), but 'a' has"),
        (lambda: Panel("p", {"a": np.zeros((1, 4, 4))}), r"'a' has shape \(1, 4, 4\), expected \[H,W\]"),
        (lambda: Panel("p", {"a": np.full((4, 4), np.nan)}), "'a' has values that are not finite"),
        (lambda: make_panel(boxes=[[5, 5, 2, 9]]), r"boxes: \[5.0, 5.0, 2.0, 9.0\] is not a box"),
        (lambda: make_panel(boxes=[1, 2, 3, 4]), r"boxes: shape \(4,\), expected \[L,4\]"),
        (lambda: make_panel(difference=("LIDnet", "nobody")), "'nobody' is not one of its images"),
        (lambda: make_panel(detections={"control": []}), "'control' is not one of its images"),
        (lambda: ScoreMaps("m", "", 0.0, {}), "maps 'm': limit is 0.0"),
        (lambda: ScoreMaps("m", "", 1.0, {"a": {"x": [[0]]}, "b": {"y": [[0]]}}), "'b' has the arms y, expected x"),
        (lambda: ScoreMaps("m", "", 1.0, {"a": {"x": [0]}}), r"'x' of 'a' isn't a finite \[H,W\]"),
        (lambda: make_panel(detections={"MSE": [((0, 0, 1, 1), 7.0)]}), "a detection in 'MSE' has score 7.0"),
    ],
)
def test_bad_input_names_itself_in_one_line(make, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)

"""Real files of public collections, which are no part of this project: LIDNET_FAST_REAL_DATA names their folder."""

import csv
import gzip
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pydicom
import pytest

from lidnet_fast.cli import main
from lidnet_fast.data.annotations import read_annotations
from lidnet_fast.data.formats.dicom.pixels import decode
from lidnet_fast.data.formats.dicom.series import CTSeries, scan
from lidnet_fast.data.formats.dicom.writer import read_image
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.inference import denoise
from tests.inference.conftest import expected, make_run, run

__all__ = ["expected", "make_run", "run"]

ROOT = Path(os.environ.get("LIDNET_FAST_REAL_DATA") or Path(__file__).parents[2] / "../shared/data/real").resolve()
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"needs real files in {ROOT} (LIDNET_FAST_REAL_DATA)")

LOSSLESS = (
    *("BigEndianExplicit", "DeflatedExplicitVRLittleEndian", "JPEG2000LosslessOnly", "JPEGLSLossless"),
    *("JPEGProcess14", "JPEGProcess14SV1", "LittleEndianExplicit", "LittleEndianImplicit", "RLELossless"),
)
LOSSY = {  # syntax: largest and mean difference in HU
    "JPEG2000": (6, 0.6),
    "JPEGLSLossy": (1, 0.6),
    "JPEGProcess1": (65, 14),  # 8 bits for 5,500 HU
    "JPEGProcess2_4": (36, 3.6),
    "JPEGProcess6_8": (36, 3.6),
    "JPEGProcess10_12": (36, 3.6),
}


def slice_in(syntax: str) -> Path:
    (path,) = (ROOT / "transfer_syntaxes").glob(f"CTImage.dcm_{syntax}TransferSyntax_*")
    return path


def hu_as_it_is() -> np.ndarray:
    """Of the slice in implicit little endian, by what its header says."""
    image = pydicom.dcmread(ROOT / "transfer_syntaxes" / "CTImage.dcm")
    stored = np.frombuffer(image.PixelData, "<i2").reshape(image.Rows, image.Columns)
    assert (image.RescaleSlope, image.RescaleIntercept) == (1, -1024)
    return np.maximum(stored.astype(int) - 1024, -1024)


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_one_slice_in_every_transfer_syntax(syntax):
    (series,) = scan([slice_in(syntax)]).series
    prepared, denoised = series.read()[0].astype(int), read_image(slice_in(syntax)).hu[0]
    assert np.abs(prepared - denoised).max() <= 0.5
    difference = np.abs(prepared - hu_as_it_is())
    largest, mean = LOSSY.get(syntax, (0, 0))
    assert difference.max() <= largest
    assert difference.mean() <= mean


def test_all_transfer_syntaxes_at_once(tmp_path, run, expected):
    """One series: those without loss are copies of each other, and so are the three encodings of the same 12 bits."""
    for path in (ROOT / "transfer_syntaxes").glob("CTImage.dcm*"):
        shutil.copy(path, tmp_path / path.name.split("Syntax_")[0])
    assert len(list(tmp_path.iterdir())) == 16
    summary = denoise(tmp_path, tmp_path / "out", model=run, precision="float32")
    assert summary.failures == []
    assert (summary.slices, dict(summary.skipped)) == (5, {"copies of another": 11})
    made = list((tmp_path / "out").rglob("CTImage*"))
    assert len(made) == 5
    for path in made:
        source, result = decode(tmp_path / path.name), pydicom.dcmread(path)
        hu, outside = source.hu(0)
        difference = np.abs(decode(path).hu(0)[0] - expected(hu[None])[0].clip(-1024))[~outside]
        assert difference.max() <= source.rescale[0, 0] / 2 + 1e-2
        lossy = not any(path.name == "CTImage.dcm" or f"_{syntax}Transfer" in path.name for syntax in LOSSLESS)
        assert (result.get("LossyImageCompression") == "01") == lossy
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InputError, match="two different slices at the same position"):  # which is no volume
        scan([tmp_path])


def test_a_radiotherapy_study(tmp_path, run):
    """The CT slice is used; structures and plan are no CT."""
    summary = denoise(ROOT / "rt", tmp_path / "out", model=run)
    assert (summary.slices, summary.failures, dict(summary.skipped)) == (1, [], {"not CT": 2})
    prepared = prepare([ROOT / "rt"], tmp_path / "store", val_fraction=0, test_fraction=0)
    assert (prepared.slices["train"], dict(prepared.skipped)) == (1, {"not CT": 2})
    image = pydicom.dcmread(ROOT / "rt" / "ct.0.dcm")
    stored = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
    np.testing.assert_array_equal(Store(tmp_path / "store").read(0, 0), np.maximum(stored, -1024))


def series_of(uid, heights, sop_instance_uids=(), size=512, pixel=0.7, corner=(0.0, 0.0)) -> CTSeries:
    """Slices at these heights."""
    return CTSeries(
        series_uid=uid,
        patient_id=uid,
        files=(Path(uid),),
        sop_instance_uids=tuple(sop_instance_uids),
        positions=tuple((*corner, float(z)) for z in heights),
        shape=(len(heights), size, size),
        spacing=(1.0, pixel, pixel),
        orientation=(1, 0, 0, 0, 1, 0),
    )


def test_all_nodules_of_luna16(tmp_path):
    with (ROOT / "luna16" / "annotations.csv").open() as file:
        rows = list(csv.DictReader(file))
    nodules = defaultdict(list)
    for row in rows:
        nodules[row["seriesuid"]].append([float(row[name]) for name in ("coordX", "coordY", "coordZ", "diameter_mm")])
    scans = (ROOT / "luna16" / "seriesuids.csv").read_text().split()
    assert (len(rows), len(nodules), len(scans)) == (1186, 601, 888)
    assert nodules.keys() <= set(scans)
    series = []
    for uid, places in nodules.items():
        bottom, top = np.array(places)[:, 2].min() - 40, np.array(places)[:, 2].max() + 40
        series.append(series_of(uid, np.arange(bottom, top), size=1024, corner=(-350.0, -350.0)))
    boxes = read_annotations(ROOT / "luna16" / "annotations.csv", series)
    missing = []
    for one in series:
        for x, y, z, diameter in nodules[one.series_uid]:
            column, row = (x + 350) / 0.7 + 0.5, (y + 350) / 0.7 + 0.5
            place = int(np.abs(np.array(one.distances) - z).argmin())
            around = [
                box
                for box in boxes[one.series_uid]
                if box[0] == place
                and box[1] <= column <= box[3]
                and box[2] <= row <= box[4]
                # The circle that a plane at most half a slice off its centre cuts out.
                and 0.7 * (box[3] - box[1]) <= diameter + 1e-3
            ]
            if not around:
                missing.append((one.series_uid, x, y, z))
    assert missing == []
    assert sum(len(np.unique(rows[:, 0])) for rows in boxes.values()) > 3 * len(rows)


def test_candidates_made_of_luna16s_tables(tmp_path):
    """Of four nodules, one is found surely, one twice and less surely, two not. Every excluded finding that lies in no
    nodule is found most surely, which doesn't count. Half of the scans have a false positive between the two."""
    tables = {name: tmp_path / f"{name}.csv" for name in ("annotations", "excluded", "candidates")}
    shutil.copy(ROOT / "luna16" / "annotations.csv", tables["annotations"])
    with gzip.open(ROOT / "luna16" / "annotations_excluded.csv.gz", "rt") as file:
        tables["excluded"].write_text(file.read())
    nodules, excluded = (list(csv.reader(tables[name].open()))[1:] for name in ("annotations", "excluded"))
    scans = (ROOT / "luna16" / "seriesuids.csv").read_text().split()
    rng, lines = np.random.default_rng(0), []
    for number, (uid, *sphere) in enumerate(nodules):
        *centre, diameter = map(float, sphere)
        direction = rng.normal(size=3)
        jittered = centre + direction / np.linalg.norm(direction) * rng.uniform(0, 0.49) * diameter
        if number % 4 == 0:
            lines.append([uid, *jittered, 0.9])
        elif number % 4 == 1:
            lines += [[uid, *jittered, 0.7], [uid, *centre, 0.6]]
    of_scan = defaultdict(list)
    for uid, *sphere in nodules:
        of_scan[uid].append([float(value) for value in sphere])
    for uid, *sphere in excluded[::20]:
        place = np.array(sphere[:3], float)
        if all(np.linalg.norm(place - one[:3]) > one[3] / 2 for one in of_scan[uid]):
            lines.append([uid, *place, 1.0])
    lines += [[uid, 5000, 5000, 5000, 0.8] for uid in scans[::2]]
    text = "\n".join(",".join(map(str, line)) for line in lines)
    tables["candidates"].write_text(f"seriesuid,coordX,coordY,coordZ,probability\n{text}\n")
    main(
        [
            *("evaluate", "--candidates", str(tables["candidates"]), "--annotations", str(tables["annotations"])),
            *("--excluded", str(tables["excluded"]), "--series-uids", str(ROOT / "luna16" / "seriesuids.csv")),
            *("--out", str(tmp_path / "out")),
        ]
    )
    result = json.loads((tmp_path / "out" / "scans.json").read_text())
    assert (result["scans"], result["lesions"], len(excluded)) == (888, 1186, 35192)
    # 1,186 nodules are 297 and 297 and two lots of 296; 444 false positives in 888 scans are 0.5 per scan.
    surely, all_found = 297 / 1186, 594 / 1186
    values = {rate: value for rate, (value, _, _) in result["sensitivity"].items()}
    expected = {"0.125": surely, "0.25": surely, **dict.fromkeys(("0.5", "1", "2", "4", "8"), all_found)}
    assert values == pytest.approx(expected, abs=1e-12)
    low, high = result["sensitivity"]["8"][1:]
    # As of a proportion of so many nodules, which are a little alike within a scan.
    assert 0.02 < high - low < 0.1 and low < all_found < high


def outlines_of(path: Path) -> tuple[str, dict[tuple[str, float], list[np.ndarray]]]:
    """Series of a LIDC-IDRI file, and the outlines of more than a point by image and height."""
    root = ElementTree.parse(path).getroot()
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
    outlines = defaultdict(list)
    for nodule in root.iter("unblindedReadNodule"):
        for roi in nodule.iter("roi"):
            key = roi.findtext("imageSOP_UID").strip(), float(roi.findtext("imageZposition"))
            points = [[int(edge.findtext(name)) for name in ("xCoord", "yCoord")] for edge in roi.iter("edgeMap")]
            outlines[key] += [np.array(points)] if len(points) > 1 and roi.findtext("inclusion") == "TRUE" else []
    return root.findtext(".//SeriesInstanceUid"), outlines


def test_all_outlines_of_lidc_idri():
    """With one reader enough, every slice that somebody outlined has a box at each outline, and no other slice."""
    files = sorted((ROOT / "lidc_xml").glob("*.xml"))
    assert len(files) == 24
    read = 0
    for path in files:
        uid, outlines = outlines_of(path)
        if uid is None or not outlines:
            continue
        read += 1
        if not any(outlines.values()):
            with pytest.raises(InputError, match="has no lesion in any of the 1 series found"):
                read_annotations(path, [series_of(uid, [0.0], ["1.2.3"])], readers=1)
            continue
        images = sorted(outlines, key=lambda image: image[1])
        series = series_of(uid, [z for _, z in images], [sop for sop, _ in images])
        boxes = read_annotations(path, [series], readers=1)[uid]
        for place, image in enumerate(images):
            here = boxes[boxes[:, 0] == place][:, 1:]
            inside = [points for points in outlines[image] if (np.ptp(points, axis=0) > 1).all()]
            assert bool(len(here)) == bool(inside), (path.name, image)
            for points in inside:
                x, y = points.mean(axis=0)
                near = (here[:, 0] - 2 <= x) & (x <= here[:, 2] + 2) & (here[:, 1] - 2 <= y) & (y <= here[:, 3] + 2)
                assert near.any(), (path.name, image)
    assert read >= 10

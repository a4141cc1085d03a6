from importlib import resources

import numpy as np
import pytest

from lidnet_fast.data.phantoms.lidc import lesion_geometry, load_lidc_boxes


def test_the_table_is_the_one_its_readme_describes():
    table = load_lidc_boxes()
    assert len(table) == 15812
    agreed = load_lidc_boxes(min_readers=2)
    assert len(agreed) == 10922
    assert agreed["readers"].min() == 2
    assert len(np.unique(agreed["scan"])) == 802
    width = agreed["x2"] - agreed["x1"]
    np.testing.assert_allclose(
        np.percentile(width, [1, 5, 25, 50, 75, 95, 99]), [4.7, 6, 8.7, 12, 19, 34, 43], atol=0.5
    )


def test_the_table_travels_with_its_attribution():
    readme = (resources.files("lidnet_fast.data.phantoms") / "tables" / "README.md").read_text()
    assert "10.7937/K9/TCIA.2015.LO9QL9SX" in readme
    assert "CC BY 3.0" in readme


def test_geometry_is_the_table_shrunk_by_a_pixel_a_side():
    table, geometry = load_lidc_boxes(2), lesion_geometry(2)
    assert geometry.dtype == np.float32
    large = table["x2"] - table["x1"] > 6
    np.testing.assert_allclose(geometry[large, 0], (table["x2"] - table["x1"])[large] - 2, atol=1e-4)
    np.testing.assert_allclose(geometry[:, 3], (table["y1"] + table["y2"]) / 2, atol=1e-4)
    assert geometry[:, :2].min() == 3


def test_shared_tables_cannot_be_written():
    for table in (load_lidc_boxes(), load_lidc_boxes(3), lesion_geometry()):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = table[1]


@pytest.mark.parametrize("readers", [0, 5])
def test_impossible_reader_counts_are_refused(readers):
    with pytest.raises(ValueError, match=f"min_readers must be 1 to 4, got {readers}"):
        load_lidc_boxes(readers)

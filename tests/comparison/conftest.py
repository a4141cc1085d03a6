from pathlib import Path

import pytest

from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.phantoms.study import Study, make_study
from tests.comparison.commands import run, write_config
from tests.conftest import Once


@pytest.fixture(scope="session")
def small_store(once: Once) -> Path:
    """Phantoms of two validation and three test patients."""
    study = Study(
        patients=(("train", 3), ("val", 2), ("test", 3)),
        phantom=ChestPhantom(image_size=128, slices=2, lesions_per_slice=(2, 3)),
        dose_fraction=0.05,
    )
    return once("small_store", lambda path: make_study(path, study, seed=0, workers=1))


@pytest.fixture
def config(small_store: Path, tmp_path: Path) -> Path:
    """A comparison of seconds: every code path, no quality."""
    return write_config(tmp_path / "compare.yaml", small_store)


@pytest.fixture(scope="session")
def compared(once: Once, small_store: Path) -> Path:
    """The folder of that comparison, done in one go by a process of its own; not to be changed."""

    def made(path: Path) -> None:
        config = write_config(path.with_name("compared.yaml"), small_store)
        assert run(config, path).returncode == 0

    return once("compared", made)

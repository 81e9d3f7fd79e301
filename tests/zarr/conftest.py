from pathlib import Path

import pytest
import three_ranks


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three ranks, for reading only."""
    return three_ranks.checkpoint(tmp_path_factory)


@pytest.fixture(scope="session")
def archives(checkpoint: Path) -> list[Path]:
    """Its archives, in the order of the ranks."""
    return sorted(checkpoint.glob("data-*/rank-*.zarr.zip"))

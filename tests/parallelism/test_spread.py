"""FSDP1, ZeroRedundancyOptimizer, FSDP2 and whole: what one has saved, the others load, bit for bit."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

pytest.importorskip("torch")
from spread_layouts import LAYOUTS

JOB = Path(__file__).parent / "spread_job.py"


def problems_of(folder: Path, nth: int, largest: int) -> dict[str, str]:
    """Try every `nth` pair of each layout, at 1 to `largest` ranks."""
    job = run_ranks(4, JOB, folder, nth, largest, timeout=600)
    assert job.returncode == 0, job.stdout[-6000:]
    return {
        f"{what} on rank {rank}": problem
        for rank in range(4)
        for what, problem in json.loads((folder / f"rank-{rank}.json").read_text()).items()
    }


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return problems_of(tmp_path_factory.mktemp("spread"), 20, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_holds_the_whole_tensors_under_the_names_of_the_bare_model(
    layout: str, problems: dict[str, str]
) -> None:
    assert not {what: one for what, one in problems.items() if what.partition(" on ")[0][2:] == layout}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_gets_its_parts_of_what_others_have_saved(layout: str, problems: dict[str, str]) -> None:
    found = {w: one for w, one in problems.items() if " -> " in w and w.split(" -> ")[1].split(" on ")[0][2:] == layout}
    assert not found


@pytest.mark.long
@pytest.mark.timeout(650)
def test_each_rank_gets_its_parts_of_a_third_of_what_others_have_saved(tmp_path: Path) -> None:
    assert not problems_of(tmp_path, 3, 4)

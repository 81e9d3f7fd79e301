"""Parameters and moments that FSDP2 keeps on the CPU go to other splits and come from them."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

pytest.importorskip("torch")

JOB = Path(__file__).parent / "offload_job.py"
CASES = (
    "offloaded by 2 -> offloaded by 3",
    "offloaded by 2 -> fsdp2 by 3",
    "offloaded by 2 -> whole by 3",
    "fsdp2 by 3 -> offloaded by 2",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("offloaded")
    job = run_ranks(3, JOB, folder)
    assert job.returncode == 0, job.stdout[-6000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("case", CASES)
def test_what_fsdp2_keeps_on_the_cpu_is_restored_there_and_anywhere(case: str, found: list[dict[str, str]]) -> None:
    told = [one[case] for one in found if case in one]
    assert told == [""] * (2 if case.endswith("2") else 3)

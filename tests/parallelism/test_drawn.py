"""Networks of drawn sizes, uneven in all ways, from each split to each: bit for bit, and nothing is read twice."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Job

pytest.importorskip("torch")
from drawn_layouts import CASES, Sizes

JOB = Path(__file__).parent / "drawn_job.py"
FLAT = ("fsdp1",)
"""Layouts whose flat parameters can be in one group only."""


class Asked:
    """Four ranks that save and load as they are asked; started anew when they did not answer."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lives, self._job, self._count = folder, 0, None, 0
        self._here = folder

    _job: Job | None

    def ask(self, sizes: Sizes, saves: str, loads: list[str], one_group: bool) -> dict[str, str]:
        """Return what was wrong, by case and rank."""
        if self._job is None:
            self._here = self._folder / str(self._lives)
            self._here.mkdir()
            self._job, self._count, self._lives = Job(4, JOB, self._here), 0, self._lives + 1
        number = self._tell({"sizes": asdict(sizes), "saves": saves, "loads": loads, "one_group": one_group})
        replies = [self._here / f"{number}-{rank}.json" for rank in range(4)]
        deadline = time.monotonic() + 120
        while not all(reply.exists() for reply in replies):
            if time.monotonic() > deadline or any(rank.poll() is not None for rank in self._job.ranks):
                printed = self._job.printed()
                self._job.__exit__(None, None, None)
                self._job = None
                pytest.fail(f"no answer to {saves} → {loads}: {printed[-6000:]}")
            time.sleep(0.005)
        found = enumerate(json.loads(reply.read_text()) for reply in replies)
        return {f"{what} on rank {rank}": problem for rank, one in found for what, problem in one.items()}

    def _tell(self, what: Any) -> int:
        number, self._count = self._count, self._count + 1
        new = self._here / f"{number}.new"
        new.write_text(json.dumps(what))
        new.rename(self._here / f"{number}.json")
        return number

    def close(self) -> None:
        if self._job is not None:
            self._tell(None)
            assert self._job.wait(60) == 0, self._job.printed()
            self._job.__exit__(None, None, None)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    asked = Asked(tmp_path_factory.mktemp("drawn"))
    yield asked
    asked.close()


def one_group(cases: list[str]) -> bool:
    """Whether one of these layouts takes an optimizer of one group only."""
    return any(case.partition("-")[2] in FLAT for case in cases)


SIZES = st.builds(
    Sizes,
    vocabulary=st.integers(1, 13),
    width=st.integers(1, 5),
    hidden=st.integers(1, 6),
    heads=st.integers(1, 3),
    queries=st.integers(1, 3),
    experts=st.integers(1, 5),
    layers=st.integers(1, 3),
    listed=st.booleans(),
    tied=st.booleans(),
    cuts=st.integers(0, 1000),
)


def run(ranks: Asked, sizes: Sizes, saves: str, loads: list[str]) -> None:
    assert not ranks.ask(sizes, saves, loads, one_group([saves, *loads]))


def drawn(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@drawn(4)
@given(sizes=SIZES, saves=st.sampled_from(CASES), loads=st.sampled_from(CASES))
def test_what_one_split_has_saved_another_loads_bit_for_bit(ranks: Asked, sizes: Sizes, saves: str, loads: str) -> None:
    run(ranks, sizes, saves, [loads])


def test_tensors_without_elements_are_saved_and_loaded_under_fsdp2(ranks: Asked) -> None:
    run(ranks, Sizes(hidden=0, layers=1), "2-fsdp2", ["2-fsdp2", "1-whole"])


@pytest.mark.long
@drawn(8)
@given(sizes=SIZES, saves=st.sampled_from(CASES), loads=st.lists(st.sampled_from(CASES), min_size=1, max_size=3))
def test_what_many_splits_have_saved_others_load_bit_for_bit(
    ranks: Asked, sizes: Sizes, saves: str, loads: list[str]
) -> None:
    run(ranks, sizes, saves, loads)


FLAT_OR_ZERO = ["3-fsdp1", "4-fsdp1-orig", "3-zero"]
STAGES = ["2-pipeline-2", "4-pipeline-4", "4-pipeline-fsdp2", "3-interleaved"]
BY_HAND = ["2-by-hand", "3-by-hand", "4-by-hand-2x2", "4-pipeline-by-hand"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("savers", "loaders"),
    [(FLAT_OR_ZERO, STAGES + BY_HAND), (STAGES, FLAT_OR_ZERO + BY_HAND), (BY_HAND, FLAT_OR_ZERO + STAGES)],
    ids=["from fsdp1 and zero", "from stages", "from parts by hand"],
)
def test_each_kind_of_split_takes_what_the_others_have_saved(
    ranks: Asked, savers: list[str], loaders: list[str]
) -> None:
    for number, saver in enumerate(savers):
        run(ranks, Sizes(listed=number % 2 == 1, tied=number % 4 > 1), saver, loaders)

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptengine as ce
from ckptengine.data.readers import BinaryRows, Lines
from ckptengine.data.shards import Shards
from ckptengine.errors import CheckpointError, LoadMismatchError, StateError, StorageError
from ckptengine.state.values import encode

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(lambda counts: sum(counts) >= 12)


def relaxed(examples: int) -> settings:
    """So many examples, however busy the machine is."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def made(path: str, start: int) -> Iterator[str]:
    """Records of a shard that is in no file: its path says how many it has."""
    for number in range(start, int(path.rpartition("/")[2])):
        yield f"{path}:{number}"


def shards(counts: list[int]) -> list[str]:
    return [f"made://{number}/{count}" for number, count in enumerate(counts)]


def all_records(counts: list[int]) -> Counter[str]:
    return Counter(record for path in shards(counts) for record in made(path, 0))


def ranks_of(counts: list[int], world_size: int, global_batch: int, **options: Any) -> list[ce.ElasticBatches]:
    return [
        ce.ElasticBatches(
            shards(counts), global_batch, open=made, counts=counts, rank=rank, world_size=world_size, **options
        )
        for rank in range(world_size)
    ]


def moved(states: list[dict[str, Any]], to: list[ce.ElasticBatches]) -> None:
    """Load ranks from the states of others, as the engine does it: what is per rank is given to rank 0, summed."""
    digests = [state["digest"] for state in states]
    for rank, batches in enumerate(to):
        values = [digest.value for digest in digests]
        digest = digests[0].resize(values, rank, len(to))
        batches.load_state_dict({**states[0], "digest": digest})


@given(
    COUNTS,
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.sampled_from([4, 6, 7, 12]),
    st.integers(1, 4),
    st.sampled_from([None, 1, 2]),
    st.data(),
)
@relaxed(60)
def test_restarts_at_any_numbers_of_ranks_skip_and_repeat_no_record(
    counts: list[int], sizes: list[int], global_batch: int, lanes: int, micro_batch: int | None, data: st.DataObject
) -> None:
    if micro_batch == 2 and global_batch < 8:
        micro_batch = 1  # else there are fewer micro-batches than ranks
    options = {
        "lanes": lanes,
        "block": global_batch * data.draw(st.integers(1, 3)),
        "micro_batch": micro_batch,
        "seed": 3,
    }
    # What is left of an epoch must give each rank a record: at most four ranks, so restarts come before the last four.
    last_restart = (sum(counts) - 12) // global_batch
    cuts = sorted(data.draw(st.lists(st.integers(0, last_restart), min_size=len(sizes) - 1, max_size=len(sizes) - 1)))
    used: Counter[str] = Counter()
    ranks = ranks_of(counts, sizes[0], global_batch, **options)
    for size, cut in zip(sizes[1:], cuts, strict=True):
        before = ranks[0].global_batches
        for batches in ranks:
            parts = batches.batches()
            while batches.global_batches < cut:
                used.update(next(parts))
        assert ranks[0].global_batches == max(before, cut)
        states = [batches.state_dict() for batches in ranks]
        ranks = ranks_of(counts, size, global_batch, **options)
        moved(states, ranks)
    lengths = {len(batches) for batches in ranks} if micro_batch is None else set()
    for batches in ranks:
        left = list(batches.batches())
        used.update(record for batch in left for record in batch)
        if micro_batch is None:
            assert lengths == {len(left)}
        assert (batches.epoch, batches.consumed) == (1, 0)
    assert used == all_records(counts)


def test_the_batches_are_the_same_whatever_the_number_of_ranks() -> None:
    counts = [40, 0, 25, 90, 3]
    wholes = []
    for size in (1, 2, 3, 6):
        parts = [list(batches.batches()) for batches in ranks_of(counts, size, 12, lanes=5, micro_batch=2)]
        each = [len(p) // 13 for p in parts]
        assert sum(each) == 6
        wholes.append([m for step in range(13) for p, n in zip(parts, each, strict=True) for m in p[step * n :][:n]])
    assert wholes[0] == wholes[1] == wholes[2] == wholes[3]


def test_a_restart_reads_nothing_that_was_consumed() -> None:
    """A reader that can seek is asked for the records that are left, and for no other one."""
    counts = [100] * 20
    read: Counter[str] = Counter()

    def counting(path: str, start: int) -> Iterator[str]:
        for record in made(path, start):
            read[record] += 1
            yield record

    used: Counter[str] = Counter()
    state = None
    for size, stop in ((3, 21), (2, 57), (4, None)):
        read.clear()
        handed: Counter[str] = Counter()
        states = []
        for rank in range(size):
            batches = ce.ElasticBatches(
                shards(counts), 20, open=counting, counts=counts, lanes=10, rank=rank, world_size=size
            )
            if state is not None:
                batches.load_state_dict({**state, "digest": "0" * 32})
            for batch in batches.batches():
                handed.update(batch)
                if batches.global_batches == stop:
                    break
            states.append(batches.state_dict())
        state = states[0]
        # Lanes that two ranks share (3 ranks and 4, of 10 lanes) are read by both.
        assert sum(read.values()) <= sum(handed.values()) * 1.5
        assert not set(read) & set(used)
        if size == 2:
            assert read == handed
        used.update(handed)
    assert used == all_records(counts)


def test_each_worker_reads_lanes_of_its_own_where_a_round_has_as_many_batches(tmp_path: Path) -> None:
    reads = tmp_path / "reads"

    def noting(path: str, start: int) -> Iterator[str]:
        for record in made(path, start):
            with reads.open("a") as file:
                file.write(f"{record}\n")
            yield record

    counts = [90, 70, 80]
    totals = {}
    for batches_per_round in (2, 1):
        reads.write_text("")
        batches = ce.ElasticBatches(shards(counts), 8, open=noting, counts=counts, lanes=4, block=8 * batches_per_round)
        for _ in batches.batches(batches.loader(num_workers=2)):
            pass
        totals[batches_per_round] = len(reads.read_text().splitlines())
    assert totals[2] == 240  # each record once, by one of the two
    assert 420 <= totals[1] <= 480  # each worker passes by what the other one reads


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2, "prefetch_factor": 4},
        {"num_workers": 3, "persistent_workers": True},
    ],
    ids=["none", "two", "persistent"],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_that_fetch_ahead_lose_and_repeat_nothing(options: dict[str, Any]) -> None:
    """Two epochs, each left in the middle and begun again, with one loader: as without workers."""
    counts = [5, 0, 17, 60, 1, 33]
    plain, batches = (
        ce.ElasticBatches(shards(counts), 13, open=made, counts=counts, lanes=4, last="ragged") for _ in range(2)
    )
    loader = batches.loader(**options)
    for epoch in range(2):
        expected = list(plain.batches())
        found = []
        for batch in batches.batches(loader):
            found.append(batch)
            assert batches.state_dict()["consumed"] == (len(found) * 13 if len(found) < 9 else 0)
            if len(found) == 4:
                break
        found += batches.batches(loader)
        assert found == expected
        assert len(found) == 9
        assert batches.epoch == epoch + 1
    assert batches.state_dict()["digest"].value == plain.state_dict()["digest"].value
    assert batches.state_dict()["ledger"] == plain.state_dict()["ledger"]


def test_workers_that_are_spawned_read_the_same_also_when_files_were_open_before(tmp_path: Path) -> None:
    paths = text_shards(tmp_path)
    plain, batches = (ce.ElasticBatches(paths, 9, lanes=2) for _ in range(2))
    expected = list(plain.batches())
    found = [next(batches.batches())]
    found += batches.batches(batches.loader(num_workers=1, multiprocessing_context="spawn"))
    assert found == expected


def test_a_step_of_several_micro_batches_is_not_saved_in_its_middle_and_goes_on_there() -> None:
    counts = [50]
    plain, batches = (ce.ElasticBatches(shards(counts), 8, open=made, counts=counts, micro_batch=2) for _ in range(2))
    expected = list(plain.batches())
    found = []
    for batch in batches.batches():
        found.append(batch)
        assert batches.size == 8
        assert batches.complete == (len(found) % 4 == 0)
        if len(found) == 6:
            break
    with pytest.raises(StateError, match=r"data\.cursor: global batch 1 is half used .* 2 of its 4 micro-batches"):
        encode(batches.state_dict()["cursor"], ("data", "cursor"))
    assert len(batches) == len(expected) - 6
    assert found + list(batches.batches()) == expected
    assert batches.state_dict()["digest"].value == plain.state_dict()["digest"].value


def test_the_global_batch_may_grow_within_a_run_where_the_rounds_stay() -> None:
    counts = [70, 30]
    used: Counter[str] = Counter()
    state = None
    for size in (5, 10, 20):
        batches = ce.ElasticBatches(shards(counts), size, open=made, counts=counts, block=10, lanes=5)
        if state is not None:
            batches.load_state_dict(state)
        for batch in batches.batches():
            assert len(batch) == size
            used.update(batch)
            if batches.consumed in (20, 40):
                break
        state = batches.state_dict()
    assert used == all_records(counts)


def test_a_process_that_reads_and_then_forks_workers_shares_no_file_with_them(tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        (tmp_path / name).write_text("".join(f"{name}{n}\n" for n in range(40_000)))
        paths.append(tmp_path / name)
    batches = ce.ElasticBatches(paths, 1000, lanes=2)
    found = []
    for batch in batches.batches():
        found += batch
        if batches.global_batches == 20:
            break
    loader = batches.loader(num_workers=2)
    for batch in batches.batches(loader):
        found += batch
        if batches.global_batches == 40:
            break
    for batch in batches.batches():
        found += batch
    assert sorted(found) == sorted(f"{name}{n}" for name in "ab" for n in range(40_000))


def test_collate_makes_batches_in_the_workers() -> None:
    batches = ce.ElasticBatches(
        shards([20]), 5, open=made, counts=[20], collate=lambda records: torch.full((len(records),), float(os.getpid()))
    )
    for batch in batches.batches(batches.loader(num_workers=1)):
        assert batch.tolist() == [batch[0]] * 5
        assert batch[0] != os.getpid()


def test_making_and_starting_a_loader_draws_nothing_from_the_global_generator() -> None:
    batches = ce.ElasticBatches(shards([40]), 8, open=made, counts=[40])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for options in ({}, {"num_workers": 1}):
        next(batches.batches(batches.loader(**options)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_job_that_loops_over_the_loader_itself_gets_an_error_at_its_first_save(tmp_path: Path) -> None:
    for options in ({}, {"num_workers": 1}):
        batches = ce.ElasticBatches(shards([40]), 8, open=made, counts=[40])
        loader = batches.loader(**options)
        with ce.Checkpointer(tmp_path / "run", every=2, preemption=None) as ckpt:
            with pytest.raises(StateError, match=r"data\.cursor: .*loop over `data\.batches\(loader\)`"):
                for step, _ in enumerate(loader, start=1):
                    ckpt.step(step, {"data": batches})
            assert step == 2
        used = list(batches.batches(loader))
        assert len(used) == 5  # nothing was lost by it
        encode(batches.state_dict()["cursor"], ("data", "cursor"))


def drawn_in_worker(records: list[str]) -> float:
    return torch.rand(()).item()


def test_workers_draw_other_numbers_in_each_epoch_and_the_same_ones_in_another_life() -> None:
    def epochs() -> list[float]:
        batches = ce.ElasticBatches(shards([40]), 8, open=made, counts=[40], collate=drawn_in_worker)
        loader = batches.loader(num_workers=1)
        return [number for _ in range(3) for number in batches.batches(loader)]

    assert len(set(epochs())) == 15
    assert epochs() == epochs()


@pytest.mark.parametrize("last", ["drop", "pad"])
def test_the_rest_of_an_epoch_is_dropped_or_filled_up_from_its_start(last: Any) -> None:
    counts = [9, 14]
    parts = [list(batches.batches()) for batches in ranks_of(counts, 2, 4, lanes=2, last=last)]
    assert {len(batch) for part in parts for batch in part} == {2}
    used = Counter(record for part in parts for batch in part for record in batch)
    assert sum(used.values()) == (20 if last == "drop" else 24)
    assert set(used) <= set(all_records(counts))
    if last == "pad":
        assert set(used) == set(all_records(counts))
        assert parts[1][-1][-1] == parts[0][0][0]


def text_shards(folder: Path, lines: int = 30, files: int = 3) -> list[Path]:
    paths = [folder / f"{number}.txt" for number in range(files)]
    for path in paths:
        path.write_text("".join(f"{path.stem}:{n}\n" for n in range(lines)))
    return paths


@pytest.mark.parametrize(
    ("given_count", "found"), [(29, "29 records expected, as counted or given, 30 found"), (31, "31 .*, 30 found")]
)
def test_a_file_with_more_or_fewer_records_than_counted_is_named(tmp_path: Path, given_count: int, found: str) -> None:
    batches = ce.ElasticBatches(text_shards(tmp_path, files=1), 4, counts=[given_count], lanes=2)
    with pytest.raises(StorageError, match=rf"0\.txt: {found}"):
        list(batches.batches())


def test_a_file_that_changed_or_vanished_since_it_was_counted_is_named_also_from_a_worker(tmp_path: Path) -> None:
    paths = text_shards(tmp_path)
    batches = ce.ElasticBatches(paths, 4, lanes=1)
    paths[1].write_text("")
    with pytest.raises(StorageError, match=r"1\.txt has 0 bytes, 140 when its records were counted"):
        list(batches.batches())
    paths[1].unlink()
    with pytest.raises(StorageError, match=r"1\.txt: the shard can't be read"):
        list(batches.batches(batches.loader(num_workers=1)))


def test_after_a_failed_read_a_new_loop_goes_on_where_the_old_one_was() -> None:
    failures = iter([False] * 30 + [True] + [False] * 1000)

    def flaky(path: str, start: int) -> Iterator[str]:
        for record in made(path, start):
            if next(failures):
                raise OSError("the network is away")
            yield record

    counts = [40, 25]
    batches = ce.ElasticBatches(shards(counts), 8, open=flaky, counts=counts, lanes=2)
    found: list[str] = []
    with pytest.raises(OSError, match="network"):
        for batch in batches.batches():
            found += batch
    assert 0 < len(found) < 65
    found += [record for batch in batches.batches() for record in batch]
    assert Counter(found) == all_records(counts)


def test_a_position_in_other_shards_is_refused_with_what_differs(tmp_path: Path) -> None:
    paths = text_shards(tmp_path)
    state = ce.ElasticBatches(paths, 4).state_dict()
    with pytest.raises(LoadMismatchError, match="counts"):
        ce.ElasticBatches(paths[:2], 4).load_state_dict(state)
    with pytest.raises(LoadMismatchError, match="lanes 2 here, 4 there"):
        ce.ElasticBatches(paths, 4, lanes=2).load_state_dict(state)
    paths[2].rename(tmp_path / "other.txt")
    with pytest.raises(LoadMismatchError, match="names"):
        ce.ElasticBatches([*paths[:2], tmp_path / "other.txt"], 4).load_state_dict(state)


def test_wrong_uses_are_refused_with_what_to_do(tmp_path: Path) -> None:
    paths = text_shards(tmp_path)
    batches = ce.ElasticBatches(paths, 4)
    with pytest.raises(TypeError, match=r"loader\(shuffle=...\): ElasticBatches decides that itself"):
        batches.loader(shuffle=True)
    with pytest.raises(TypeError, match=r"give collate= to ElasticBatches"):
        batches.loader(collate_fn=list)
    with pytest.raises(TypeError, match="in_order"):
        batches.loader(in_order=False)
    with pytest.raises(TypeError, match=r"loader\(generator=...\): ElasticBatches decides that itself"):
        batches.loader(generator=torch.Generator())
    with pytest.raises(TypeError, match=r"make its DataLoader with \.loader"):
        next(iter(torch.utils.data.DataLoader(batches, batch_size=None)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was not made by loader"):
        next(batches.batches(torch.utils.data.DataLoader([1, 2])))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="counts= goes with a list of files"):
        ce.ElasticBatches(Shards.count(paths), 4, counts=[30] * 3)
    with pytest.raises(ValueError, match="give both, or neither"):
        ce.ElasticBatches(paths, 4, rank=0)
    with pytest.raises(ValueError, match="lanes=5 over rounds of 4"):
        ce.ElasticBatches(paths, 4, lanes=5)
    with pytest.raises(ValueError, match="global_batch=0: records of all ranks"):
        ce.ElasticBatches(paths, 0)
    with pytest.raises(ValueError, match="over rounds of 0 records"):
        ce.ElasticBatches(paths, 4, block=0)


def test_a_restore_in_the_middle_of_a_loop_ends_the_loop_with_an_error(tmp_path: Path) -> None:
    batches = ce.ElasticBatches(text_shards(tmp_path), 4)
    state = batches.state_dict()
    loop = batches.batches()
    next(loop)
    batches.load_state_dict(state)
    with pytest.raises(CheckpointError, match="it was loaded, or moved by another loop"):
        next(loop)


def test_binary_records_and_one_huge_file_are_cut_into_lanes_too(tmp_path: Path) -> None:
    rows = np.arange(7000, dtype=np.int32).reshape(1000, 7)
    (tmp_path / "a.bin").write_bytes(rows.tobytes())
    reader = BinaryRows("<i4", (7,))
    ranks = [
        ce.ElasticBatches([tmp_path / "a.bin"], 40, open=reader, collate=np.stack, rank=rank, world_size=4)
        for rank in range(4)
    ]
    batches = [list(rank.batches()) for rank in ranks]
    first = np.concatenate([parts[0] for parts in batches])
    assert len(np.unique(first[:, 0] // 175)) == 40  # 40 lanes of 25 records each
    assert np.array_equal(np.unique(np.concatenate([b for parts in batches for b in parts]), axis=0), rows)


def test_a_lane_keeps_one_file_open(tmp_path: Path) -> None:
    opened: list[tuple[str, int]] = []

    class Noting(Lines):
        def open(self, path: str, start: int, marks=()):
            opened.append((Path(path).name, start))
            return super().open(path, start, marks)

    paths = text_shards(tmp_path, lines=60, files=4)
    batches = ce.ElasticBatches(paths, 8, open=Noting(), lanes=2)
    records = [record for batch in batches.batches() for record in batch]
    assert len(set(records)) == 240
    assert sorted(opened) == [(f"{n}.txt", 0) for n in range(4)]


def test_random_arguments_give_ranks_the_same_number_of_batches() -> None:
    generator = random.Random(5)
    for _ in range(100):
        counts = [generator.randrange(50) for _ in range(generator.randint(1, 6))]
        size = generator.randint(1, 4)
        if sum(counts) < size:
            continue
        ranks = ranks_of(counts, size, generator.randint(size, 20), lanes=1)
        assert len({len(list(batches.batches())) for batches in ranks}) == 1

"""The sampler under torch's DataLoader: what training consumed is counted, whatever the workers fetched ahead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import ckptengine as ce
from ckptengine.errors import CheckpointError, StateError


class Numbers(Dataset[int]):
    """Sample n is n."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> int:
        return index


def sampler(rank: int = 0, world_size: int = 1, **options: Any) -> ce.ElasticSampler:
    return ce.ElasticSampler(50, 8, seed=1, rank=rank, world_size=world_size, **options)


def all_lists(**options: Any) -> list[list[int]]:
    return list(sampler(**options))


def joined(lists: Iterable[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]


LOADERS = {
    "main process": {},
    "workers and prefetch": {"num_workers": 2, "prefetch_factor": 3},
    "persistent workers": {"num_workers": 2, "persistent_workers": True},
}


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS.keys())
def test_a_loop_that_is_left_early_goes_on_with_the_batch_after_the_last_one_it_was_given(
    options: dict[str, Any],
) -> None:
    data = sampler()
    loader = DataLoader(Numbers(), batch_sampler=data, **options)
    given: list[list[int]] = []
    for leave_after in (1, 3, 100):
        for count, batch in enumerate(data.batches(loader), start=1):
            given.append(batch.tolist())
            assert data.global_batches == len(given)
            assert (data.epoch, data.consumed) == ((0, 8 * len(given)) if len(given) < 7 else (1, 0))
            if count == leave_after:
                break
    assert given == all_lists()
    assert [batch.tolist() for batch in data.batches(loader)] != given  # the next epoch, in another order
    assert data.epoch == 2


class Augmented(Dataset[float]):
    """Each sample is a random number that its worker draws."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return torch.rand(()).item()


class Wrapped:
    """A loader around a DataLoader, as Lightning's Fabric makes: its iterator is made when the first batch is due."""

    def __init__(self, loader: DataLoader[float]) -> None:
        vars(self).update(vars(loader))
        self._loader = loader

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from self._loader


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_whose_iterator_is_made_late_draws_nothing_of_training_s_numbers(workers: int) -> None:
    drawn = []
    for wrap in (lambda loader: loader, Wrapped):
        torch.manual_seed(0)
        data = ce.ElasticSampler(8, 4, rank=0, world_size=1)
        loader = wrap(DataLoader(Augmented(), batch_sampler=data, num_workers=workers))
        drawn.append([[batch.tolist() for batch in data.batches(loader)] for _ in range(2)] + [torch.rand(2).tolist()])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("own_generator", [False, True])
def test_workers_draw_other_numbers_in_each_epoch_and_on_each_rank_and_training_keeps_its_own(
    own_generator: bool,
) -> None:
    """A job whose model is on an accelerator draws nothing from torch's CPU stream between two epochs."""

    def epochs(rank: int, seed: int = 0) -> list[list[float]]:
        torch.manual_seed(seed)
        data = ce.ElasticSampler(8, 4, rank=rank, world_size=2)
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        loader = DataLoader(Augmented(), batch_sampler=data, num_workers=1, generator=generator)
        streams = [torch.get_rng_state(), *([generator.get_state()] if generator else [])]
        drawn = [[x for batch in data.batches(loader) for x in batch.tolist()] for _ in range(3)]
        after = [torch.get_rng_state(), *([generator.get_state()] if generator else [])]
        assert all(map(torch.equal, streams, after))
        return drawn

    every = epochs(0) + epochs(1) + epochs(0, seed=1)
    assert len({number for drawn in every for number in drawn}) == 9 * 4
    assert epochs(0) == every[:3]


def test_epochs_end_where_they_were_planned_to_end_after_a_restart_anywhere() -> None:
    def train(data: ce.ElasticSampler, stop: int) -> list[tuple[int, list[int]]]:
        used = []
        for epoch in range(data.epoch, 2):
            for batch in data.batches():
                used.append((epoch, batch))
                if len(used) == stop:
                    return used
        return used

    whole = train(sampler(), -1)
    assert len(whole) == 14
    for stop in range(1, 15):  # 7 is exactly at the first epoch's end, 14 at the end of training
        first, second = sampler(), sampler()
        before = train(first, stop)
        second.load_state_dict(unwrapped(first.state_dict()))
        assert before + train(second, -1) == whole


def test_training_ends_after_its_epochs_also_where_loops_are_left_early_and_the_job_is_restarted() -> None:
    def train(data: ce.ElasticSampler, stop: int) -> list[list[int]]:
        used = []
        while data.epoch < 2:
            for number, batch in enumerate(data.batches(), start=1):
                used.append(batch)
                if len(used) == stop:
                    return used
                if number == 3:
                    break
        return used

    whole = train(sampler(), -1)
    assert len(whole) == 14
    for stop in range(1, 15):
        first, second = sampler(), sampler()
        before = train(first, stop)
        second.load_state_dict(unwrapped(first.state_dict()))
        assert before + train(second, -1) == whole


class Ahead:
    """Fetches each batch while the one before is used."""

    def __init__(self, loader: DataLoader[int]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return self.ahead(iter(self.loader))

    def ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        following = None
        for batch in batches:
            current, following = following, batch
            if current is not None:
                yield current
        if following is not None:
            yield following


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS.keys())
def test_what_reads_ahead_around_the_loader_is_not_counted_ahead(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    data = sampler()
    loader = Ahead(DataLoader(Numbers(), batch_sampler=data, **options))
    given: list[list[int]] = []
    for leave_after in (2, 100):
        for count, batch in enumerate(data.batches(loader), start=1):
            given.append(batch.tolist())
            assert data.global_batches == len(given)
            if count == leave_after:
                break
    assert given == all_lists()
    assert torch.equal(torch.get_rng_state(), before)


def unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.value if isinstance(value, ce.PerRank) else value for key, value in state.items()}


def test_the_ranks_of_each_global_batch_share_it_without_overlap() -> None:
    whole = all_lists()
    parts = [all_lists(rank=rank, world_size=3) for rank in range(3)]
    # Of 50 samples 2 are left: too few for 3 ranks, so the last batch has 10.
    assert [joined(own) for own in zip(*parts, strict=True)] == [*whole[:5], whole[5] + whole[6]]
    assert [len(own) for own in parts[0]] == [len(own) for own in parts[0][:5]] + [3]


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("last", ["ragged", "drop", "pad"])
def test_its_length_is_the_number_of_lists_that_are_left(last: Any, micro_batch: int | None) -> None:
    for rank in range(2):
        data = sampler(rank, 2, last=last, micro_batch=micro_batch)
        left = len(list(sampler(rank, 2, last=last, micro_batch=micro_batch)))
        assert len(DataLoader(Numbers(), batch_sampler=data)) == len(data) == left
        for _ in data.batches():
            left -= 1
            assert len(data) == (left or len(list(sampler(rank, 2, last=last, micro_batch=micro_batch))))


def test_a_loader_that_gives_batches_out_of_order_is_refused() -> None:
    data = sampler()
    with pytest.raises(ValueError, match="in_order=False"):
        data.batches(DataLoader(Numbers(), batch_sampler=data, num_workers=1, in_order=False))
    with pytest.raises(ValueError, match="not from this sampler"):
        data.batches(DataLoader(Numbers(), batch_sampler=sampler()))
    with pytest.raises(ValueError, match="not from this sampler"):
        data.batches(DataLoader(Numbers(), batch_size=4))


def test_a_loader_that_skips_or_adds_batches_is_an_error() -> None:
    data = sampler()

    class Odd:
        def __init__(self, batches: int) -> None:
            self.batches = batches

        def __iter__(self) -> Any:
            lists = iter(data)
            drawn = [next(lists) for _ in range(3)]
            yield from (drawn + drawn)[: self.batches]

    with pytest.raises(CheckpointError, match="more batches than it drew"):
        list(data.batches(Odd(4)))
    with pytest.raises(CheckpointError, match="ended with 2 lists of the epoch not handed out"):
        list(sampled(data, Odd(2)))
    with pytest.raises(CheckpointError, match="without drawing from this sampler"):
        list(data.batches([1, 2]))


def sampled(data: ce.ElasticSampler, loader: Any) -> Any:
    assert (data.global_batches, data.consumed) == (3, 24)  # what came before the error was handed out
    return data.batches(loader)


def test_a_job_that_never_counts_gets_an_error_at_its_first_save(tmp_path: Path) -> None:
    data = sampler()
    with ce.Checkpointer(tmp_path / "run", every=2) as ckpt:
        with pytest.raises(StateError, match=r"data\.cursor: .*loop over `sampler\.batches\(loader\)`"):
            for step, _ in enumerate(DataLoader(Numbers(), batch_sampler=data), start=1):
                ckpt.step(step, {"data": data})
        assert step == 2
        for step, _ in enumerate(data.batches(DataLoader(Numbers(), batch_sampler=data)), start=1):
            ckpt.step(step, {"data": data})
    assert ce.load(tmp_path / "run")["data"]["batches"] == 6


def test_looking_at_a_batch_before_restoring_does_no_harm(tmp_path: Path) -> None:
    data = sampler()
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        lists = data.batches()
        used = [next(lists), next(lists)]
        ckpt.save(2, {"data": data})
    again = sampler()
    assert next(iter(again)) == used[0]
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        assert ckpt.restore({"data": again}) == 2
        ckpt.save(3, {"data": again})
    assert used + list(again.batches()) == all_lists()


def test_micro_batches_are_counted_when_the_global_batch_is_complete(tmp_path: Path) -> None:
    data = sampler(micro_batch=3)  # 3, 3 and 2 samples
    sizes, complete = [], []
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        for micro in data.batches():
            sizes.append(len(micro))
            complete.append(data.complete)
            if len(sizes) == 2:
                with pytest.raises(StateError, match="global batch 0 is half used .* 2 of its 3 micro-batches"):
                    ckpt.save(1, {"data": data})
                assert data.global_batches == 0
            if len(sizes) == 4:
                break
        # Left in the middle of a global batch, the next loop goes on in the middle of it.
        for micro in data.batches():
            sizes.append(len(micro))
            complete.append(data.complete)
            if data.complete:
                ckpt.save(data.global_batches, {"data": data})
                assert data.size == (8 if data.epoch == 0 else 2)
    assert sizes == [3, 3, 2] * 6 + [2]
    assert complete == [False, False, True] * 6 + [True]
    assert ce.load(tmp_path / "run")["data"]["epoch"] == 1


def test_loading_during_a_loop_ends_it_with_an_error_instead_of_a_wrong_count() -> None:
    data = sampler()
    start = unwrapped(data.state_dict())
    lists = data.batches()
    next(lists)
    next(lists)
    data.load_state_dict(start)
    with pytest.raises(CheckpointError, match="begin a new loop"):
        next(lists)
    assert list(data.batches()) == all_lists()


def test_a_changed_global_batch_goes_on_from_the_same_sample() -> None:
    data = sampler()
    lists = data.batches()
    used = joined(next(lists) for _ in range(2))
    other = ce.ElasticSampler(50, 11, seed=1, rank=0, world_size=1)
    other.load_state_dict(unwrapped(data.state_dict()))
    rest = list(other.batches())
    assert [len(part) for part in rest] == [11, 11, 11, 1]
    assert used + joined(rest) == joined(all_lists())
    assert [run.end for run in other._cursor.ledger.runs()] == [16, 49, 50]


def test_a_rank_s_place_is_the_job_s_and_needs_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ce.ElasticSampler(5, 5)._cursor.world_size == 1
    with pytest.raises(ValueError, match="give both"):
        ce.ElasticSampler(5, 5, rank=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match="pass `rank=` and `world_size=`"):
        ce.ElasticSampler(5, 5)


def test_the_core_needs_no_torch() -> None:
    code = (
        "import sys, ckptengine as ce; s = ce.ElasticSampler(9, 2); assert len(list(s.batches())) == 5; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sequential_samples_come_as_they_are_numbered() -> None:
    assert joined(all_lists(shuffle=False)) == list(range(50))
    assert sorted(joined(all_lists())) == list(range(50))
    assert np.concatenate(all_lists(last="pad"))[:50].tolist() == joined(all_lists())

"""Options that one rank gives and another does not: they hold for all, or are refused; no rank waits for another."""

import contextlib

import pytest
import torch
from stages import StageJob
from thread_ranks import Ranks

import ckptengine as ce
from ckptengine.errors import CheckpointError, RestoreDifferenceError, StateError


class Forgetful:
    """An object that does not take its state."""

    def state_dict(self):
        return {"n": torch.ones(1)}

    def load_state_dict(self, state):
        self.state_dict = lambda: {"n": torch.zeros(1)}


@pytest.mark.parametrize("verifies", [0, 1])
def test_where_one_rank_verifies_a_load_all_do(tmp_path, verifies):
    """The ranks are asked together: the one that verified waited for the other until the timeout."""
    with StageJob(tmp_path / "run", 2) as job:
        job.save([{"held": Forgetful(), "x": torch.ones(2)} for _ in range(2)])
        found = [{"held": Forgetful(), "x": torch.zeros(2)} for _ in range(2)]
        with pytest.raises(RestoreDifferenceError, match="held.n: other contents"):
            job.each(
                lambda rank: ce.load(
                    tmp_path / "run", into=found[rank], comm=job.comm(rank), timeout=20, verify=rank == verifies
                )
            )
        job.load([{"held": Forgetful(), "x": torch.zeros(2)} for _ in range(2)], verify=False)


def test_replicas_that_only_some_ranks_are_to_compare_are_refused_at_once(tmp_path):
    """Boxes of arrays that several ranks hold are compared together: the others waited until the timeout."""
    ranks = Ranks(3)

    def save(rank: int) -> None:
        part = ce.ShardedArray(torch.full((2,), float(rank % 2)), (4,), (2 * (rank % 2),))
        checkpointer = ce.Checkpointer(
            tmp_path / "run",
            comm=ranks.comms[rank],
            timeout=20,
            preemption=None,
            on_error="raise",
            check_replicas="first" if rank < 2 else "never",
        )
        try:
            checkpointer.save(1, {"x": part}).durable.result(20)
        finally:
            with contextlib.suppress(CheckpointError):
                checkpointer.close()

    with pytest.raises(StateError, match="check_replicas is first or always on ranks 0.*1, never on rank 2"):
        ranks.run(save)
    ranks.end()

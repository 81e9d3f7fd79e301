"""The MindSpore training of docs/mpi.md, whose ranks average their gradients by MPI: killed, and gone on with."""

import json
from collections import namedtuple
from itertools import pairwise

import pytest
from mpirun import HERE, mpirun

from ckptengine.audit import audit

pytestmark = pytest.mark.long

EPOCHS, EVERY = 3, 5
STEPS = EPOCHS * 15  # 1797 digits, 120 a step

Life = namedtuple("Life", "restored begin steps")
"""What each rank restored, its state after that, and its state after each step, by the step's number."""


def live(folder, run, ranks, killed=0):
    """Run the job once; return its life. Where a rank is killed, the job must have ended by that, else well."""
    folder.mkdir()
    job = mpirun(ranks, HERE / "mindspore_job.py", folder, run, EPOCHS, killed, GLOG_v="3")
    assert (job.returncode == 0) == (killed == 0), job.stdout[-2000:] + job.stderr[-8000:]
    lines = [list(map(json.loads, file.read_text().splitlines())) for file in sorted(folder.glob("*.jsonl"))]
    assert len(lines) == ranks
    for first, *_ in lines:
        assert first["communicator"] == ("StoreCommunicator" if ranks > 1 else "SingleProcess")
        assert not first["torch"]
    begins = [first["state"] for first, *_ in lines]
    assert all(begin == begins[0] for begin in begins)
    restored = {first["restored"] for first, *_ in lines}
    assert len(restored) == 1
    # Ranks that were ended with the killed one may lack the last steps.
    steps = [{line["step"]: line["state"] for line in of_rank} for _, *of_rank in lines]
    for others in steps[1:]:
        assert all(steps[0][step] == state for step, state in others.items() if step in steps[0])
    return Life(restored.pop(), begins[0], max(steps, key=len))


def test_a_mindspore_job_under_mpi_goes_on_on_2_3_and_1_ranks_with_the_next_sample_and_the_same_state(tmp_path):
    undisturbed = live(tmp_path / "undisturbed", tmp_path / "one", 2)
    assert list(undisturbed.steps) == list(range(1, STEPS + 1))

    run = tmp_path / "many"
    lives = [
        live(tmp_path / "first", run, 2, killed=13),
        live(tmp_path / "second", run, 2, killed=24),
        live(tmp_path / "third", run, 3, killed=36),
        live(tmp_path / "fourth", run, 1),
    ]
    assert lives[0].restored is None
    for before, after in pairwise(lives):
        assert after.restored in range(EVERY, max(before.steps) + 1, EVERY)
        assert after.restored > (before.restored or 0)
        assert after.begin == before.steps[after.restored]
        assert min(after.steps) == after.restored + 1
    assert max(lives[-1].steps) == STEPS
    # On as many ranks it is the undisturbed training, also after the restart; on others, the same samples.
    for life in lives[:2]:
        assert all(state == undisturbed.steps[step] for step, state in life.steps.items())
    for life in lives[2:]:
        assert all(state["position"] == undisturbed.steps[step]["position"] for step, state in life.steps.items())

    for path, worlds in ((tmp_path / "one", [2]), (run, [2, 2, 3, 1])):
        report = audit(path, deep=True)
        assert report.clean, report.findings
        (cursor,) = report.cursors
        assert (cursor.finished_epochs, cursor.batches) == (EPOCHS, STEPS)
        assert [life.world_size for life in cursor.lives] == worlds

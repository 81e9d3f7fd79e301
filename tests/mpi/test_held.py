"""Ranks that hold the interpreter's lock between two calls, and wait for the others meanwhile."""

import pytest
from mpirun import reports

from ckptengine.catalog.listing import newest
from ckptengine.storage.local import LocalStorage


def test_no_call_needs_a_rank_that_is_back_from_it_and_holds_the_interpreters_lock(tmp_path):
    assert len(reports(3, "held_job.py", tmp_path)) == 3


@pytest.mark.parametrize(("who", "told"), [(1, 0), (0, 1), (1, 2)])
def test_a_job_that_is_told_to_end_meanwhile_saves_a_step_and_ends(tmp_path, who, told):
    ended = [report["ended"] for report in reports(3, "told_job.py", tmp_path, who, told)]
    found = newest(LocalStorage(tmp_path / "run"))
    assert ended == [found.step] * 3

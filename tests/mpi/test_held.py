"""Ranks that hold the interpreter's lock between two calls, and wait for the others meanwhile."""

from mpirun import reports


def test_no_call_needs_a_rank_that_is_back_from_it_and_holds_the_interpreters_lock(tmp_path):
    assert len(reports(3, "held_job.py", tmp_path)) == 3

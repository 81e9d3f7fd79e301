"""The communicator over MPI, with real ranks under mpiexec at thread level `single`."""

import pytest
from mpirun import reports

RANKS = 4


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return reports(RANKS, "comm_job.py", tmp_path_factory.mktemp("comm"))


def test_every_value_comes_to_every_rank_in_rank_order(said):
    for report in said:
        assert report["gathered"] == ["", "1", "22", "333"]
        assert report["empty"] == [""] * RANKS
        assert report["broadcast"] == [f"from {root}" for root in range(RANKS)]


def test_values_larger_than_one_collective_carries_come_whole(said):
    assert all(report["pieces"] and report["large broadcast"] for report in said)


def test_a_late_rank_is_named_on_all_ranks_and_on_itself(said):
    for report in said:
        assert report["late to connect"] == [
            "DeadlineError",
            "connecting (operation 0): rank 2 did not come within 2 s",
        ]
        kind, text = report["late"]
        assert kind == "DeadlineError"
        assert text.endswith("rank 2 did not come within 2 s")


def test_a_late_rank_0_is_named_and_hears_who_gave_up(said):
    leader, *others = (report["leader late"] for report in said)
    assert leader[0] == "DeadlineError"
    assert leader[1].endswith("ranks 1, 2, 3 gave up waiting before")
    for kind, text in others:
        assert kind == "DeadlineError"
        assert text.endswith("rank 0 did not come within 2 s")


def test_the_group_works_again_after_a_failed_operation(said):
    for report in said:
        for name in ("after late", "after leader", "after contradiction"):
            assert report[name] == ["0", "1", "2", "3"]


def test_a_rank_that_leaves_operations_out_is_named_and_comes_in_step_again(said):
    everyone = [b"%d" % rank for rank in range(RANKS)]
    for rank, report in enumerate(said):
        for name, who in (("left out", 2), ("left out twice", 1)):
            assert rank == who or report[name][1].endswith(f"rank {who} did not come within 2 s")
            assert report[f"next to {name}"] == ["returned", str(everyone)]
        assert rank == 0 or report["left out by the leader"][1].endswith("rank 0 did not come within 2 s")
        # Whoever comes first finds that the others have given up, or have come again.
        kind, text = report["next to left out by the leader"]
        assert (kind, text) == ("returned", str(everyone)) or "gave up waiting before" in text
        for name in ("left out", "left out twice", "left out by the leader"):
            assert report[f"after {name}"] == ["0", "1", "2", "3"]


def test_ranks_that_call_different_operations_are_told_so(said):
    for report in said:
        kind, text = report["contradiction"]
        assert kind == "RankFailedError"
        assert "rank 1 is in a barrier" in text


def test_another_threads_first_meeting_is_refused_where_mpi_is_for_one(said):
    for report in said:
        kind, text = report["other thread"]
        assert kind == "CheckpointError"
        assert 'mpi4py.rc.thread_level = "serialized"' in text


def test_the_background_waits_for_other_ranks_while_all_meet_though_mpi_is_for_one_thread(said):
    assert all(report["background"] for report in said)


def test_who_does_not_know_the_jobs_secret_is_refused_and_the_job_goes_on(said):
    secret = said[1]["secret"]
    kind, text = secret["wrong"]
    assert kind == "RankFailedError"
    assert "it refused the secret of this job" in text
    assert secret["rubbish"] == "closed"
    assert secret["silent"]


def test_a_job_on_one_machine_listens_at_the_loopback_interface_only(said):
    assert [host for host, _ in said[0]["secret"]["places"]] == ["127.0.0.1"]


def test_ranks_reach_the_store_while_rank_0_waits_for_them_and_holds_the_interpreters_lock(said):
    assert [report["held"] for report in said[1:]] == [["returned", "b''"]] * (RANKS - 1)


def test_a_forked_process_of_any_rank_uses_the_store_and_disturbs_nobody(said):
    assert [report["forked"] for report in said] == [["returned", "None"]] * RANKS


def test_a_part_of_the_ranks_can_be_a_group_of_its_own(said):
    assert [report["split"] for report in said] == [["0", "2"], ["1", "3"]] * 2


def test_no_message_falls_into_a_receive_of_the_jobs_own(said):
    assert not any(report["trap"] for report in said)

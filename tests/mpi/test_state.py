"""State of numpy arrays and of torch, saved and restored by real ranks under mpiexec; no torch.distributed."""

import subprocess
import sys

import numpy as np
import pytest
from mpirun import HERE, environment, mpirun, reports

import ckptengine as ce
from ckptengine.inspect import list_run, verify

pytestmark = pytest.mark.long

STARTS = {4: 0, 6: 2, 3: 4, 1: 6}
"""Ranks, and the step that they find: each start goes on for two steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def said(folder):
    return {ranks: reports(ranks, "state_job.py", folder, step) for ranks, step in STARTS.items()}


def test_what_4_ranks_save_6_3_and_1_restore_bit_for_bit_and_go_on_from(said, folder):
    # Every start has compared all bits; here the last step is read in one piece.
    whole = ce.load(folder / "run")
    expected = np.arange(1013 * 517, dtype=np.float64).reshape(1013, 517) / 7 + 8
    assert whole["field"].tobytes() == expected.tobytes()
    assert whole["values"]["step"] == 8
    # 4 ranks saved 200 to 203, and so on: another number of ranks gets what `resize` makes of them.
    own = {ranks: {report.get("own") for report in found} for ranks, found in said.items()}
    assert own == {
        4: {None},
        6: {sum(200 + rank for rank in range(4))},
        3: {sum(400 + rank for rank in range(6))},
        1: {sum(600 + rank for rank in range(3))},
    }


def test_the_background_writes_and_never_calls_mpi_which_is_initialized_for_one_thread(said):
    for ranks, found in said.items():
        for report in found:
            assert report["level"] == 0  # MPI_THREAD_SINGLE
            assert report["callers"] == (["MainThread"] if ranks > 1 else [])
            assert report["writers"] == ["ckptengine-save"]


def test_torch_is_not_even_imported(said):
    assert not any(report["torch"] for found in said.values() for report in found)


def test_the_ranks_of_a_node_read_what_all_need_once(said):
    nbytes = 1013 * 517 * 8 + (1 << 20) * 4
    for ranks in (6, 3):
        assert nbytes <= sum(report["read"] for report in said[ranks]) < 1.1 * nbytes


def test_a_replica_that_differs_is_named_on_all_ranks_and_the_next_save_works(said):
    for report in said[4]:
        for name in ("differing at first", "differing later"):
            kind, text = report[name]
            assert kind == "ReplicaMismatchError"
            assert "cursor: not rank 0's on rank 2" in text
        assert report["agreeing"] == report["agreeing again"] == ["saved", ""]


def test_a_rank_that_is_late_for_a_save_is_named_on_all_ranks_and_the_next_save_works(said):
    for report in said[4]:
        kind, text = report["late"]
        assert kind == "DeadlineError"
        assert "rank 1 did not report in time" in text
        assert report["after late"] == ["saved", ""]


@pytest.mark.parametrize("skipper", [1, 0])
def test_a_rank_that_leaves_a_save_out_under_mpiexec_is_named_and_the_next_save_is_made(tmp_path, skipper):
    for rank, ends in enumerate(reports(3, "left_out_job.py", tmp_path, skipper)):
        assert ends["level"] == 0  # MPI_THREAD_SINGLE
        assert [ends[step][0] for step in "1345"] == ["", "", "", ""]
        # It is told when the rank comes to the next save, and not when the time is up.
        assert ends["3"][1] < 100
        if rank != skipper:
            assert f"rank {skipper}: it has left step-00000002 out" in ends["2"][0]
    assert [entry.step for entry in list_run(tmp_path / "run")] == [1, 3, 4, 5]
    assert verify(tmp_path / "run") == []


def test_a_save_that_nobody_waits_for_is_committed_though_all_ranks_end(tmp_path):
    job = mpirun(3, HERE / "ending_job.py", tmp_path / "run")
    assert job.returncode == 0, job.stderr
    assert "ckptengine" not in job.stderr  # no rank had anything to say
    assert [entry.step for entry in list_run(tmp_path / "run")] == [1]
    assert verify(tmp_path / "run") == []


def test_no_message_stays_beside_a_committed_checkpoint(said, folder):
    committed = [manifest.parent for manifest in folder.rglob("manifest-*.json")]
    assert len(committed) == 8 + 2 + 2
    assert not [path for step in committed for path in step.rglob("message-*")]


def test_a_torch_model_is_saved_and_restored_without_torch_distributed(tmp_path):
    found = reports(2, "torch_job.py", tmp_path)
    assert [report["restored"] for report in found] == [3, 3]
    assert not any(report["distributed"] for report in found)
    saved = ce.load(tmp_path / "run")
    assert saved["model"]["0.weight"].sum().item() == pytest.approx(found[0]["sum"])
    assert saved["optimizer"]["state"]["model.0.weight"]["step"] == 3


def test_ranks_that_have_not_imported_mpi_are_told_to(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import ckptengine as ce\nce.save({str(tmp_path / 'somewhere')!r}, {{'a': 1}})\n")
    job = mpirun(2, script)
    assert job.returncode != 0
    assert "OMPI_COMM_WORLD_SIZE is 2" in job.stderr
    assert "`from mpi4py import MPI`" in job.stderr
    assert not (tmp_path / "somewhere").exists()


def test_ranks_of_which_each_sees_itself_alone_are_told_that_the_mpi_libraries_differ(tmp_path):
    program = "from mpi4py import MPI; import ckptengine as ce; ce.save('somewhere', {'a': 1})"
    job = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(SLURM_STEP_NUM_TASKS="4"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert job.returncode != 0
    assert "SLURM_STEP_NUM_TASKS is 4" in job.stderr
    assert "mpi4py sees no other rank" in job.stderr
    assert "Open MPI v5" in job.stderr
    assert not (tmp_path / "somewhere").exists()

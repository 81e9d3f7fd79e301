"""Jobs under msrun: a rank is lost during a save, and the job goes on with other numbers of ranks."""

import os

import numpy as np
import pytest

import ckptengine as ce
from tests.mindspore import training
from tests.mindspore.msrun import logs, msrun, msrun_to_its_end

pytestmark = pytest.mark.long


def test_a_rank_killed_during_a_save_is_named_and_other_numbers_of_ranks_go_on_from_the_last_good_step(tmp_path):
    run = tmp_path / "run"
    saved = msrun("msrun_start.py", 2, tmp_path / "save", run, "save", until=[0])
    assert list(saved) == [0], logs(tmp_path / "save")
    assert "rank 1" in saved[0]["error"]
    assert saved[0]["seconds"] < 5 + 30
    loaded = msrun("msrun_job.py", 4, tmp_path / "load", run, "load", until=range(4))
    assert list(loaded) == [0, 1, 2, 3], logs(tmp_path / "load")
    for rank, report in loaded.items():
        assert report["step"] == 1
        assert report["rows"]
        assert report["mine"] == {"rank": rank}
        assert report["threads"] == max(1, min(8, len(os.sched_getaffinity(0)) // 4))
        assert report["contents"] == saved[0]["contents"]
        assert ("rank 2 did not come within 2 s" in report.get("missing", "")) == (rank != 2)
    arrays = ce.load(run)
    for name, value in saved[0]["contents"].items():
        section = arrays["net"] if name in arrays["net"] else arrays["optimizer"]
        assert section[name].tobytes().hex() == value
    assert arrays["table"].tobytes() == np.random.RandomState(1).rand(10, 6).astype(np.float32).tobytes()
    _, cell = training.train_cell(seed=9)
    table = np.zeros((10, 6), np.float32)
    state = {"net": cell.network, "optimizer": cell.optimizer, "table": table}
    ce.load(run, into=state, only=list(state))
    assert {name: value.hex() for name, value in training.contents(cell).items()} == saved[0]["contents"]
    assert table.tobytes() == arrays["table"].tobytes()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A job that has imported the engine before `init`: its folder, and the exit code of msrun."""
    folder = tmp_path_factory.mktemp("ended")
    return folder, msrun_to_its_end("ending_job.py", 2, folder, folder / "run", "before")


def test_the_first_meeting_of_the_ranks_keeps_to_the_callers_timeout_and_comes_about_later(ended):
    folder, _ = ended
    seconds, _, text = (folder / "late").read_text().partition(" ")
    assert 2.0 <= float(seconds) < 60.0
    assert "some did not come to the rendezvous within 2 s, as rank 0 did" in text
    assert ce.load(folder / "run")["rows"].shape == (4, 3)


def test_a_job_that_imports_the_engine_before_init_ends_with_0_under_numpy_2_too(ended):
    tmp_path, code = ended
    assert int(np.__version__.partition(".")[0]) >= 2
    assert code == 0, logs(tmp_path)
    assert ce.load(tmp_path / "run")["rows"].tolist() == [[rank] * 3 for rank in (0.0, 0.0, 1.0, 1.0)]


def test_a_job_that_imports_the_engine_after_init_is_told_what_numpy_2_does_to_msrun(tmp_path):
    msrun_to_its_end("ending_job.py", 2, tmp_path, tmp_path / "run", "after", until=tmp_path / "run/step-00000001")
    assert ce.load(tmp_path / "run")["rows"].tolist() == [[rank] * 3 for rank in (0.0, 0.0, 1.0, 1.0)]
    for rank in (0, 1):
        said = (tmp_path / f"log/worker_{rank}.log").read_text()
        assert "put `import ckptengine.mindspore` before init()" in said

"""A checkpoint is brought to a directory: once, whole, and only where it belongs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from buckets import QUICK, Bucket
from cli_run import Call
from servers import Proxy
from tier_files import archive_of, end, files_of, flip, of_step, said_so_far, start, steps_of, upload
from waiting import until

import ckptengine as ce
from ckptengine.catalog.lease import LEASE_SECONDS
from ckptengine.catalog.listing import lineage
from ckptengine.catalog.retention import remove_leftovers
from ckptengine.errors import CheckpointDamagedError, CheckpointNotFoundError, DeadlineError, StorageError
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.remote import RemoteStorage
from ckptengine.tiers.lock import locked
from ckptengine.tiers.prefetch import Prefetched, prefetch

DATA = re.compile(r"GET .*(rank-\d+|layout)\.zarr\.zip")


@pytest.fixture
def through_proxy(uploaded: str, disturbed: Bucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run's URL, for processes that reach it through the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", disturbed.options["endpoint_url"])
    return uploaded


def fetch(source: Path, target: Path, **more: object) -> Prefetched | None:
    return prefetch(LocalStorage(source), LocalStorage(target), **more)  # type: ignore[arg-type]


def data_requests(proxy: Proxy) -> list[str]:
    return [match[1] for line in proxy.seen if (match := DATA.match(line))]


def test_a_process_fetches_the_newest_and_the_next_one_finds_it(trained_run, through_proxy, proxy, tmp_path):
    code, out, errors = end(start(through_proxy, tmp_path / "ckpt"))
    assert code == 0, errors
    assert re.search(rf"{tmp_path}/ckpt/step-00000030: step 30, generation 1, .* fetched of ", out)
    assert files_of(tmp_path / "ckpt") == of_step(trained_run, 30)
    assert float(ce.load(tmp_path / "ckpt")["shared"][0]) == 30
    proxy.seen.clear()
    code, out, errors = end(start(through_proxy, tmp_path / "ckpt"))
    assert (code, data_requests(proxy)) == (0, []), errors
    assert "step 30, generation 1 is already there" in out


def test_a_job_goes_on_from_what_was_fetched(trained_run, uploaded, tmp_path):
    assert end(start(uploaded, tmp_path / "ckpt"))[0] == 0
    state = {"shared": np.zeros(50_000, "f4"), "step": 0}
    with ce.Checkpointer(tmp_path / "ckpt", every=10, preemption=None) as ckpt:
        assert ckpt.restore(state, strict=False) == 30
        ckpt.save(40, state)
    assert state["step"] == 30
    assert steps_of(tmp_path / "ckpt") == [30, 40]


def test_a_step_can_be_asked_for_and_what_is_there_stays(run, tmp_path):
    fetch(run, tmp_path / "ckpt", step=10)
    fetch(run, tmp_path / "ckpt")
    assert files_of(tmp_path / "ckpt") == of_step(run, 10, 30)
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint of step 15; there are steps 10, 20, 30"):
        fetch(run, tmp_path / "ckpt", step=15)


def test_the_first_start_of_a_job_has_nothing_to_fetch(in_environment, tmp_path, call: Call):
    result = call("prefetch", f"{in_environment.url}/new", tmp_path / "ckpt")
    assert result.exit_code == 0
    assert f"nothing to fetch: {in_environment.url}/new has no checkpoint yet" in result.stdout
    assert call("prefetch", f"{in_environment.url}/new", tmp_path / "ckpt", "--step", 5).exit_code == 2


def test_a_bucket_that_is_not_there_or_out_of_reach_is_an_error(in_environment, tmp_path, call, quick, monkeypatch):
    missing = call("prefetch", "s3://there-is-no-such-bucket/run", tmp_path / "ckpt")
    assert missing.exit_code == 2
    assert "NoSuchBucket" in missing.stderr
    monkeypatch.setattr("ckptengine.storage.remote.Patience", lambda: replace(QUICK, seconds=1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    unreachable = call("prefetch", f"{in_environment.url}/run", tmp_path / "ckpt")
    assert unreachable.exit_code == 2
    assert "cannot list" in unreachable.stderr


def test_wrong_usage_is_told(run, tmp_path, call):
    result = call("prefetch", run, "s3://bucket/run")
    assert result.exit_code == 2
    assert "s3://bucket/run is not a local directory" in result.stderr
    assert call("prefetch", run).exit_code == 2
    assert call("prefetch", run, tmp_path / "ckpt", "--step", -1).exit_code == 2


@pytest.mark.parametrize("place", ["an archive", "its end", "a manifest", "a missing file"])
def test_where_the_newest_is_damaged_the_one_before_it_is_fetched(run, tmp_path, call, place):
    name, record = archive_of(LocalStorage(run), 2)
    if place == "an archive":
        flip(run / name, record.tail_position // 2)
    elif place == "its end":
        flip(run / name, record.nbytes - 10)
    elif place == "a missing file":
        (run / name).unlink()
    else:
        (run / "step-00000030/manifest-0001.json").write_bytes(b"{}")
    result = call("prefetch", run, tmp_path / "ckpt")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"step-00000030 is damaged; the previous checkpoint is tried: .*step-00000030", result.stderr)
    assert files_of(tmp_path / "ckpt") == of_step(run, 20)


def test_where_nothing_is_whole_that_is_said_and_nothing_is_left(run, tmp_path, call):
    for archive in run.glob("step-*/data-*/rank-00001.zarr.zip"):
        flip(archive, 5000)
    result = call("prefetch", run, tmp_path / "ckpt")
    assert result.exit_code == 1
    assert "no checkpoint is complete" in result.stderr
    assert all(f"step-000000{step}" in result.stderr for step in (10, 20, 30))
    assert files_of(tmp_path / "ckpt") == {}
    with pytest.raises(CheckpointDamagedError):
        fetch(run, tmp_path / "ckpt", step=20)


def test_a_killed_prefetch_is_gone_on_with(trained_run, through_proxy, proxy, tmp_path):
    stuck = proxy.fault("silence", "GET .*rank-00003", 10**6)
    first = start(through_proxy, tmp_path / "ckpt")
    until(lambda: len(list(tmp_path.glob("ckpt/*/data-*/*.zip"))) == 4 and stuck.done, "all files but one are there")
    first.send_signal(signal.SIGKILL)
    end(first)
    assert steps_of(tmp_path / "ckpt") == []
    stuck.times = 0
    (data,) = tmp_path.glob("ckpt/step-00000030/data-*")
    # As it would be in the middle of the file, its room reserved.
    (data / ".tmp-rank-00003.zarr.zip.0123456789ab").write_bytes(bytes(1000))
    proxy.seen.clear()
    code, out, errors = end(start(through_proxy, tmp_path / "ckpt"))
    assert code == 0, errors
    assert set(data_requests(proxy)) == {"rank-00003"}
    assert "fetched of" in out
    assert files_of(tmp_path / "ckpt") == of_step(trained_run, 30)


def test_what_was_damaged_in_the_directory_is_replaced(run, tmp_path):
    fetch(run, tmp_path / "ckpt")
    (archive,) = tmp_path.glob("ckpt/step-00000030/data-*/rank-00001.zarr.zip")
    archive.write_bytes(archive.read_bytes()[:-4096])
    done = fetch(run, tmp_path / "ckpt")
    assert done is not None
    assert done.moved_nbytes == archive.stat().st_size
    assert files_of(tmp_path / "ckpt") == of_step(run, 30)


def test_several_at_once_share_one_download(trained_run, through_proxy, proxy, tmp_path):
    slow = proxy.fault("silence", "GET .*rank-00002", 10**6)
    first = start(through_proxy, tmp_path / "ckpt")
    until(lambda: slow.done, "the first one is at work")
    others = [start(through_proxy, tmp_path / "ckpt") for _ in range(2)]
    until(lambda: all(b"waiting for process" in said_so_far(other) for other in others), "the others wait")
    slow.times = 0
    results = [end(process) for process in (first, *others)]
    assert [code for code, _, _ in results] == [0, 0, 0], results
    assert all(f"waiting for process {first.pid} on " in errors for _, _, errors in results[1:])
    assert all("is already there" in out for _, out, _ in results[1:])
    wanted = data_requests(proxy)
    alone = {name: wanted.count(name) for name in wanted}
    alone["rank-00002"] -= slow.done
    assert len(set(alone[f"rank-{rank:05d}"] for rank in range(4))) == 1, "each archive was read once"
    assert files_of(tmp_path / "ckpt") == of_step(trained_run, 30)


def test_waiting_for_another_ends_in_time(run, tmp_path, call):
    (tmp_path / "ckpt").mkdir()
    with locked(str(tmp_path / "ckpt/prefetch.lock"), 1, print):
        result = call("prefetch", run, tmp_path / "ckpt", "--timeout", 0.3)
        assert result.exit_code == 2
        assert "waiting for process" in result.stderr
        assert "has held this lock for 0.3 s" in result.stderr
        with pytest.raises(DeadlineError):
            fetch(run, tmp_path / "ckpt", timeout=0)
    assert fetch(run, tmp_path / "ckpt") is not None


def test_a_directory_of_another_run_is_refused_before_anything_is_fetched(through_proxy, proxy, tmp_path):
    with ce.Checkpointer(tmp_path / "ckpt", every=1, preemption=None) as ckpt:
        ckpt.save(7, {"w": np.arange(10.0)})
    before = files_of(tmp_path / "ckpt")
    code, _, errors = end(start(through_proxy, tmp_path / "ckpt"))
    assert code == 2
    assert re.search(rf"{tmp_path}/ckpt holds another run than {through_proxy}: .*a place of its own", errors)
    assert data_requests(proxy) == []
    assert files_of(tmp_path / "ckpt") == before


def test_a_run_and_a_checkpoint_by_itself_do_not_mix(run, tmp_path):
    ce.save(tmp_path / "point", {"w": np.arange(10.0)})
    done = fetch(tmp_path / "point", tmp_path / "copy")
    assert done is not None
    assert files_of(tmp_path / "copy") == files_of(tmp_path / "point")
    for source, target in ((run, tmp_path / "copy"), (tmp_path / "point", run)):
        before = files_of(target)
        with pytest.raises(StorageError, match=rf"{target} holds .*, not {source}: give another directory"):
            fetch(source, target)
        assert files_of(target) == before


def test_a_checkpoint_that_was_replaced_by_another_is_fetched_again(tmp_path):
    for value in (1, 2):
        ce.save(tmp_path / "point", {"w": np.full(10, value)})
        fetch(tmp_path / "point", tmp_path / "copy")
        assert ce.load(tmp_path / "copy")["w"][0] == value


def test_what_the_directory_has_newer_of_the_run_is_kept(run, tmp_path):
    fetch(run, tmp_path / "ckpt")
    with ce.Checkpointer(tmp_path / "ckpt", every=10, preemption=None) as ckpt:
        ckpt.restore({"step": 0}, strict=False)
        ckpt.save(40, {"step": 40})
    (tmp_path / "ckpt/step-00000030/manifest-0001.json").unlink()
    done = fetch(run, tmp_path / "ckpt")
    assert done is not None
    assert (done.step, done.generation, done.moved_nbytes) == (40, 2, 0)
    (archive,) = tmp_path.glob("ckpt/step-00000040/data-*/rank-00000.zarr.zip")
    archive.unlink()
    done = fetch(run, tmp_path / "ckpt")
    assert done is not None
    assert done.step == 30


def test_a_directory_without_room_is_told_before_anything_is_fetched(run, small_disk, call):
    fetch(run, small_disk / "ckpt", step=10)
    result = call("prefetch", run, small_disk / "ckpt")
    assert result.exit_code == 2
    assert re.search(
        rf"{small_disk}/ckpt: [\d,]+ bytes are needed and [\d,]+ are available \(No space left on device\); make room",
        result.stderr,
    )
    assert files_of(small_disk / "ckpt") == of_step(run, 10)


def test_a_disk_that_fills_up_meanwhile_commits_nothing(run, small_disk):
    def fill(done: int, total: int) -> None:
        if not (small_disk / "filler").exists():
            status = os.statvfs(small_disk)
            with contextlib.suppress(OSError):  # another thread may have taken some of it meanwhile
                (small_disk / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - (1 << 20)))

    with pytest.raises(StorageError, match=rf"{small_disk}/ckpt/.*No space left on device"):
        fetch(run, small_disk / "ckpt", progress=fill)
    assert steps_of(small_disk / "ckpt") == []
    assert list(small_disk.rglob(".tmp-*")) == []
    (small_disk / "filler").unlink()
    fetch(run, small_disk / "ckpt")
    assert files_of(small_disk / "ckpt") == of_step(run, 30)


def test_a_checkpoint_that_is_deleted_meanwhile_is_left_for_the_one_that_came_after_it(run, tmp_path):
    newer = tmp_path / "newer"
    shutil.move(run / "step-00000030", newer)

    def advance(done: int, total: int) -> None:
        if newer.exists():
            shutil.move(newer, run / "step-00000030")
            (run / "step-00000020/manifest-0001.json").unlink()
            shutil.rmtree(run / "step-00000020")

    done = fetch(run, tmp_path / "ckpt", progress=advance)
    assert done is not None
    assert (done.step, done.damaged) == (30, ())
    assert steps_of(tmp_path / "ckpt") == [30]


def test_who_is_outrun_by_the_writer_is_told_so(run, tmp_path, monkeypatch):
    kept, newest = tmp_path / "kept", run / "step-00000030"
    shutil.copytree(newest, kept)

    def save_again(storage):
        shutil.copytree(kept, newest, dirs_exist_ok=True)
        return lineage(storage)

    monkeypatch.setattr("ckptengine.tiers.prefetch.lineage", save_again)
    with pytest.raises(StorageError, match=r"deleted faster than they can be fetched.*keep_last=") as raised:
        fetch(run, tmp_path / "ckpt", progress=lambda done, total: shutil.rmtree(newest, ignore_errors=True))
    assert not isinstance(raised.value, FileNotFoundError)  # by which a job would begin anew


def test_who_opens_the_directory_meanwhile_does_not_sweep_what_has_come(run, tmp_path, monkeypatch):
    target, swept = LocalStorage(tmp_path / "ckpt"), []
    now = LocalStorage.now
    monkeypatch.setattr(LocalStorage, "now", lambda self: now(self) + 2 * LEASE_SECONDS)

    def sweep(done: int, total: int) -> None:
        swept.append(remove_leftovers(LocalStorage(tmp_path / "ckpt")))

    prefetch(LocalStorage(run), target, progress=sweep)
    assert swept
    assert files_of(tmp_path / "ckpt") == of_step(run, 30)


def test_the_first_failure_ends_all_transfers_and_is_the_one_that_is_told(run, tmp_path, monkeypatch):
    name, record = archive_of(LocalStorage(run), 1)
    flip(run / name, record.nbytes - 10)
    told: list[str] = []
    done = fetch(run, tmp_path / "ckpt", tell=told.append)
    assert done is not None
    assert done.step == 20
    assert len(told) == len(done.damaged) == 1
    assert "rank-00001" in told[0]


def test_any_storage_can_be_fetched_from(run, tmp_path):
    source = RemoteStorage("memory://prefetch-test/run")
    for name, data in files_of(run).items():
        source.write_bytes(name, data)
    assert prefetch(source, LocalStorage(tmp_path / "ckpt")) is not None
    assert files_of(tmp_path / "ckpt") == of_step(run, 30)


def test_a_disturbed_network_is_survived(trained_run, through_proxy, proxy, tmp_path):
    kinds = "503 SlowDown", "reset before", "truncated", "wrong length"
    faults = [proxy.fault(kind, f"GET .*rank-0000{rank}") for rank, kind in enumerate(kinds)]
    code, _, errors = end(start(through_proxy, tmp_path / "ckpt"))
    assert code == 0, errors
    assert [fault.done for fault in faults] == [1] * 4
    assert files_of(tmp_path / "ckpt") == of_step(trained_run, 30)


def test_damage_in_the_bucket_is_passed_over(trained_run, in_environment, tmp_path, call):
    upload(trained_run, in_environment)
    name, record = archive_of(in_environment.storage())
    data = bytearray((trained_run / name).read_bytes())
    data[record.tail_position // 2] ^= 1
    in_environment.fs.pipe_file(f"{in_environment.url}/run/{name}", bytes(data))
    result = call("prefetch", f"{in_environment.url}/run", tmp_path / "ckpt")
    assert result.exit_code == 0
    assert re.search(rf"step-00000030 is damaged; .*{name}.*CRC32 differs", result.stderr)
    assert files_of(tmp_path / "ckpt") == of_step(trained_run, 20)

"""A storage that does not answer, or deletes more slowly than saves come: each wait ends and says for what."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptengine as ce
from ckptengine.errors import CheckpointError, DeadlineError, SaveFailedError
from ckptengine.storage.local import LocalArchiveWriter, LocalStorage

HANGS = """
import sys, threading
import numpy as np
import ckptengine as ce
from ckptengine.storage.local import LocalArchiveWriter

ckpt = ce.Checkpointer(sys.argv[1], every=1, timeout=2)
LocalArchiveWriter.finish = lambda self: threading.Event().wait()
ckpt.step(1, {"a": np.zeros(1000)})
"""


def state_at(step: int) -> dict[str, Any]:
    return {"a": np.arange(3000.0) + step, "step": step}


Hang = Callable[..., None]


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    """Have a call of a storage block until the test has ended."""
    released = threading.Event()

    def install(owner: type, name: str, only: str = "") -> None:
        real = getattr(owner, name)

        def blocked(self: Any, name: str = "", *arguments: Any, **options: Any) -> Any:
            if name.endswith(only):
                released.wait(100)
            return real(self, name, *arguments, **options) if name else real(self)

        blocked.__code__ = blocked.__code__.replace(co_name=real.__name__)
        monkeypatch.setattr(owner, real.__name__, blocked)

    yield install
    released.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ckptengine-") and thread.name != "ckptengine-signals":
            thread.join(20)


def test_opening_ends_after_the_timeout_and_names_file_and_operation(folder: Path, hang: Hang) -> None:
    hang(LocalStorage, "list")
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=f"opening {folder}: listing {folder} has not ended after 1 s"):
        ce.Checkpointer(folder, timeout=1)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("list", "listing {run}"),
        ("read_bytes", "reading {run}/step-00000001/manifest-0001.json"),
        ("read_range", "reading {run}/step-00000001/data-.*zarr.zip"),
        ("load_archive", "reading {run}/step-00000001/data-.*/rank-00000.zarr.zip"),
    ],
)
def test_restore_and_load_end_after_the_timeout_and_name_file_and_operation(
    call: str, message: str, folder: Path, hang: Hang
) -> None:
    with ce.Checkpointer(folder, every=1) as ckpt:
        ckpt.step(1, state_at(1))
    ckpt = ce.Checkpointer(folder, timeout=1)
    hang(LocalStorage, call, "rank-00000.zarr.zip" if call == "load_archive" else "")
    expected = f"{message.format(run=folder)} has not ended after 1 s"
    with pytest.raises(DeadlineError, match=expected):
        ckpt.restore(state_at(0))
    if call == "load_archive":
        # What hangs may yet write into that state: nothing is loaded beside it, in whatever state.
        expected = r"given up is still under way \(reading .*rank-00000.zarr.zip\).*end this process"
    for into in (None, state_at(0)):
        with pytest.raises(DeadlineError, match=expected):
            ce.load(folder, into=into, timeout=1)
    ckpt.close()


@pytest.mark.parametrize("call", ["create", "put_if_absent", "temporaries"])
def test_a_local_tier_that_does_not_answer_ends_the_opening(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, released = folder / "local", threading.Event()
    hang_in(monkeypatch, local, call, released)
    words = {"create": "opening", "put_if_absent": "publishing", "temporaries": "listing"}
    try:
        with pytest.raises(
            DeadlineError, match=rf"{words[call]} {local}.* has not ended after 1 s; the storage does not"
        ):
            ce.Checkpointer(folder / "run", local=local, timeout=1, preemption=None)
    finally:
        released.set()


def test_a_local_tier_that_does_not_answer_ends_the_restore(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, released = folder / "local", threading.Event()
    with ce.Checkpointer(folder / "run", local=local, preemption=None) as ckpt:
        ckpt.save(1, state_at(1))
    ckpt = ce.Checkpointer(folder / "run", local=local, timeout=1, preemption=None)
    hang_in(monkeypatch, local, "size", released)
    try:
        with pytest.raises(DeadlineError, match=rf"looking up {local}.* has not ended after 1 s; the storage does not"):
            ckpt.restore(state_at(0))
    finally:
        released.set()
    assert ckpt.restore(state_at(0)) == 1
    ckpt.close()


def test_a_claim_that_does_not_answer_ends_the_save_and_is_the_one_that_the_next_save_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    with ce.Checkpointer(folder, timeout=1, preemption=None) as ckpt:
        real = LocalStorage.put_if_absent

        def put_if_absent(self: LocalStorage, name: str, data: Any) -> bool:
            if name.startswith("generation-"):
                released.wait(100)
            return real(self, name, data)

        monkeypatch.setattr(LocalStorage, "put_if_absent", put_if_absent)
        for _ in range(2):
            with pytest.raises(DeadlineError, match=f"publishing {folder}/generation-0001.json has not|opening"):
                ckpt.save(1, state_at(1))
        released.set()
        for _ in range(50):
            try:
                ckpt.save(1, state_at(1)).durable.result()
                break
            except DeadlineError:
                continue
        assert [path.name for path in folder.glob("generation-*")] == ["generation-0001.json"]
        assert [path.name for path in folder.glob("step-*/manifest-*")] == ["manifest-0001.json"]


def test_closing_ends_where_the_storage_does_not_let_go_of_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    ckpt = ce.Checkpointer(folder, timeout=2, preemption=None)
    ckpt.save(1, state_at(1)).durable.result()
    real = LocalStorage.delete

    def delete(self: LocalStorage, name: str, **options: bool) -> None:
        if name == "writer.json":
            released.wait(100)
        real(self, name, **options)

    monkeypatch.setattr(LocalStorage, "delete", delete)
    ckpt.close()
    released.set()
    assert re.search(f"letting go of {folder}: deleting {folder}/writer.json has not ended after 2 s", caplog.text)


def hang_in(monkeypatch: pytest.MonkeyPatch, root: Path, call: str, released: threading.Event) -> None:
    """Have a call of one directory's storage block until it is released."""
    real = getattr(LocalStorage, call)

    def blocked(self: Any, name: str = "", *arguments: Any, **options: Any) -> Any:
        if self.root == root:
            released.wait(100)
        return real(self, *((name, *arguments) if name or call == "temporaries" else arguments), **options)

    blocked.__code__ = blocked.__code__.replace(co_name=call)
    monkeypatch.setattr(LocalStorage, call, blocked)


def test_a_store_that_takes_connections_and_never_answers_ends_the_opening(folder: Path) -> None:
    pytest.importorskip("s3fs")
    with socket.create_server(("127.0.0.1", 0)) as server:
        options = {
            "endpoint_url": f"http://127.0.0.1:{server.getsockname()[1]}",
            "key": "a",
            "secret": "b",
            "client_kwargs": {"region_name": "us-east-1"},
        }
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=r"s3://bucket/run"):
            ce.Checkpointer("s3://bucket/run", timeout=3, storage_options=options)
        assert time.monotonic() - began < 60


def test_a_save_that_hangs_is_told_soon_after_its_timeout_and_the_next_does_not_wait_as_long_again(
    folder: Path, hang: Hang
) -> None:
    ckpt = ce.Checkpointer(folder, every=1, timeout=2)
    hang(LocalArchiveWriter, "finish")
    began = time.monotonic()
    handle = ckpt.step(1, state_at(1))
    assert handle is not None
    with pytest.raises(DeadlineError, match=r"not reached within 2 s: finishing .*rank-00000.zarr.zip has not ended"):
        handle.durable.result()
    assert time.monotonic() - began < 20
    with pytest.raises(DeadlineError, match="is still being saved after .*: finishing .*rank-00000.zarr.zip"):
        ckpt.save(2, state_at(2))


def test_a_save_of_one_process_that_fails_raises_while_the_storage_hangs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other rank waits for its word, so the call needn't wait until the background could send one."""
    entered, released, answered = threading.Event(), threading.Event(), threading.Event()
    real = LocalStorage.make_directory

    def slow(self: LocalStorage, name: str) -> None:
        entered.set()
        released.wait(8)
        answered.set()
        real(self, name)

    with ce.Checkpointer(folder, every=None) as ckpt:
        ckpt.save(1, {"a": np.zeros(3)}).durable.result(20)
        monkeypatch.setattr(LocalStorage, "make_directory", slow)
        with pytest.raises(CheckpointError, match="odd"):
            ckpt.save(2, {"odd": object()})
        answered_first = answered.is_set()
        assert entered.wait(20)
        released.set()
        assert not answered_first


def test_the_end_of_a_process_waits_for_a_hung_save_no_longer_than_its_timeout(folder: Path) -> None:
    command = [sys.executable, "-c", HANGS, str(folder)]
    job = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert "is still being saved after" in job.stderr
    assert "finishing" not in job.stdout


# Cleaning.


def test_fast_saves_leave_no_threads_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = set(threading.enumerate()), []
    real, cleaning, together = LocalStorage.delete_tree, [], set()

    def delete_tree(self: LocalStorage, name: str) -> None:
        cleaning.append(name)
        together.add(len(cleaning))
        real(self, name)
        cleaning.pop()

    monkeypatch.setattr(LocalStorage, "delete_tree", delete_tree)
    with ce.Checkpointer(folder, every=1, keep_last=1) as ckpt:
        for step in range(1, 61):
            ckpt.step(step, state_at(step))
            new = set(threading.enumerate()) - before
            seen.append([thread.name for thread in new if thread.name.startswith("ckptengine-")])
    assert together == {1}, "one thread cleans at a time"
    # One that has nothing more to do may be ending while the next one begins.
    assert max(names.count("ckptengine-clean") for names in seen) <= 2
    assert max(map(len, seen)) <= 8, seen[-1]
    assert [path.name for path in folder.glob("step-*")] == ["step-00000060"]


def test_saves_wait_for_a_storage_that_deletes_more_slowly_and_the_log_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    may_delete, real = threading.Event(), LocalStorage.delete_tree

    def delete_tree(self: LocalStorage, name: str) -> None:
        may_delete.wait(100)
        real(self, name)

    monkeypatch.setattr(LocalStorage, "delete_tree", delete_tree)
    with ce.Checkpointer(folder, every=1, keep_last=1, timeout=4) as ckpt:
        failed = []
        for step in range(1, 14):
            try:
                ckpt.save(step, state_at(step)).durable.result()
            except SaveFailedError as error:
                failed.append(str(error))
                break
        assert step <= 12, "the backlog must be bounded"
        assert f"deleting {folder}/step-00000001/data-" in failed[0]
        assert "deleting old checkpoints is slower than saving" in caplog.text
        assert len(list(folder.glob("step-*"))) <= 12
        may_delete.set()
        ckpt.save(20, state_at(20)).durable.result()
    assert [path.name for path in folder.glob("step-*")] == ["step-00000020"]

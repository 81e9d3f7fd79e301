"""A process that has imported torch, and forks the Python processes of tests: an import costs seconds, a fork none.

What is asked for is a command line as for `python`: a script or `-c`, its arguments, the environment and where output
goes. Each process is the leader of a session of its own. Run as a script, this is the server: one connection per
process, over which its pid comes first, and its exit code when it has ended; where the test's process is gone, the
server kills what it has started, and ends.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Any

__all__ = ["Forked", "fork", "start_server"]

ROOT = Path(__file__).parent.parent.parent
# With what ranks import in their first steps, for seconds: Dynamo by an optimizer, codecs and s3fs by a checkpoint.
PRELOADED = (
    "numpy.ma", "numpy.random", "numcodecs", "s3fs", "torch._dynamo", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.onnx", "torch.utils.data", "ckptengine.checkpointer", "ckptengine.comm.torch",
    "ckptengine.data.stream", "ckptengine.storage.s3", "ckptengine.torch.adapter",
)  # fmt: skip
_ADDRESS = "CKPTENGINE_TEST_FORKS"
TELL_STACKS = signal.SIGRTMAX
"""The signal at which a process prints where its threads are."""

_server: tuple[subprocess.Popen[bytes], str] | None = None


class Forked:
    """A process of the server's, with the part of `subprocess.Popen`'s interface that tests use."""

    def __init__(
        self, connection: socket.socket, args: list[str], stdout: IO[str] | None, stderr: IO[str] | None
    ) -> None:
        self.args, self.stdout, self.stderr, self.returncode = args, stdout, stderr, None
        self._connection = connection
        self._received = b""
        connection.settimeout(60)
        while b"\n" not in self._received:
            self._received += self._more()
        line, _, self._received = self._received.partition(b"\n")
        self.pid = int(line)

    returncode: int | None

    def _more(self) -> bytes:
        data = self._connection.recv(4096)
        if not data:
            raise RuntimeError(f"the fork server has ended: {self.args}")
        return data

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, minus the signal's number where one ended it; raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                while b"\n" not in self._received:
                    self._received += self._more()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.returncode = os.waitstatus_to_exitcode(int(self._received))
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return the rest of what it prints, when it has ended."""
        rest = ""
        if self.stdout is not None and not self.stdout.closed:
            with self.stdout:
                rest = self.stdout.read()
        self.wait(timeout)
        if self.stderr is None or self.stderr.closed:
            return rest, ""
        with self.stderr:
            self.stderr.seek(0)
            return rest, self.stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended, and that is not told yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and what it has started, but for what has left its session."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.communicate()


def fork(
    arguments: list[str],
    *,
    env: dict[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdout: Any = None,
    stderr: Any = None,
) -> Forked:
    """Start `python ARGUMENTS`, a script or `-c CODE`, in a fork.

    `stdout` may be `subprocess.PIPE`, for text; so may `stderr`, which is a file until the process has ended.
    """
    reads = None
    errors = tempfile.TemporaryFile("w+") if stderr == subprocess.PIPE else None  # noqa: SIM115
    stderr = errors or stderr
    if stdout == subprocess.PIPE:
        reads, stdout = os.pipe()
    out = 1 if stdout is None else stdout if isinstance(stdout, int) else stdout.fileno()
    err = 2 if stderr is None else out if stderr == subprocess.STDOUT else stderr
    err = err if isinstance(err, int) else err.fileno()
    request = json.dumps(
        {"arguments": list(map(str, arguments)), "env": dict(os.environ if env is None else env),
         "cwd": os.fspath(cwd) if cwd is not None else os.getcwd()}
    ).encode()  # fmt: skip
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_address())
    socket.send_fds(connection, [len(request).to_bytes(8, "little")], [out, err])
    connection.sendall(request)
    try:
        output = os.fdopen(reads, "r") if reads is not None else None
        return Forked(connection, [sys.executable, *map(str, arguments)], output, errors)
    finally:
        if reads is not None:
            os.close(out)


def start_server(preload: str = "") -> None:
    """Start a server for this process and for those that it starts from now on; it takes some seconds to be there.

    `preload` names further modules, separated by commas, that it imports.
    """
    global _server
    address = os.path.join(tempfile.mkdtemp(prefix="forks-"), "socket")
    # OpenMP's threads are counted when torch is imported.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen([sys.executable, __file__, address, preload], env=environment, stdin=subprocess.PIPE)
    os.environ[_ADDRESS] = address
    _server = server, address
    atexit.register(_stop, server, address)


def _address() -> str:
    """Return where the server listens, started when it is first needed; wait until it does."""
    if _ADDRESS not in os.environ:
        start_server()
    address, end = os.environ[_ADDRESS], time.monotonic() + 120
    while not os.path.exists(address):
        assert _server is None or _server[0].poll() is None, "the fork server has ended"
        assert time.monotonic() < end, "the fork server did not come up in 120 s"
        time.sleep(0.05)
    return address


def _stop(server: subprocess.Popen[bytes], address: str) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    shutil.rmtree(os.path.dirname(address))


def serve(address: str, preload: str = "") -> None:
    """Fork what is asked for until the standard input ends."""
    import importlib

    for name in (*PRELOADED, *filter(None, preload.split(","))):
        with contextlib.suppress(ModuleNotFoundError):  # not every environment has all
            importlib.import_module(name)
    gc.freeze()  # a child's collections need not look at what all have in common
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)  # it can be seen now
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                for pid, _ in children.values():
                    os.killpg(pid, signal.SIGKILL)
                os._exit(0)
            if key.fileobj is listener:
                connection, _ = listener.accept()
                pid = _fork(connection)
                pidfd = os.pidfd_open(pid)
                children[pidfd] = pid, connection
                selector.register(pidfd, selectors.EVENT_READ)
                connection.sendall(b"%d\n" % pid)
                continue
            selector.unregister(key.fd)
            pid, connection = children.pop(key.fd)
            os.close(key.fd)
            _, status = os.waitpid(pid, 0)
            with contextlib.suppress(OSError):  # the test may no longer ask
                connection.sendall(b"%d\n" % status)
            connection.close()


def _fork(connection: socket.socket) -> int:
    data, fds, _, _ = socket.recv_fds(connection, 8, 2)
    length = int.from_bytes(data, "little")
    text = b""
    while len(text) < length:
        text += connection.recv(length - len(text))
    request = json.loads(text)
    ready, go = os.pipe()
    pid = os.fork()
    if pid:
        os.close(go)
        os.read(ready, 1)  # its session is made
        for fd in (*fds, ready):
            os.close(fd)
        return pid
    code = 1
    try:
        os.setsid()
        os.close(go)
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.closerange(3, 4096)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it
        code = _run(request["arguments"], request["env"], request["cwd"])
    finally:
        os._exit(code)


def _run(arguments: list[str], env: dict[str, str], cwd: str) -> int:
    """Be that Python process, and return its exit code."""
    import faulthandler
    import threading

    import numpy

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    first = "" if arguments[0] == "-c" else str(Path(arguments[0]).resolve().parent)
    sys.path[:0] = [first, *env.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = ["-c", *arguments[2:]] if arguments[0] == "-c" else arguments
    if env.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    numpy.random.seed()  # as in a process that imports it
    faulthandler.register(TELL_STACKS)
    code = 0
    try:
        if arguments[0] == "-c":
            main = {"__name__": "__main__", "__builtins__": __builtins__}
            exec(compile(arguments[1], "<string>", "exec"), main)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends: threads, then what was registered, then the streams.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(*sys.argv[1:])

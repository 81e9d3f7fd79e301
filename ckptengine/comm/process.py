"""One identity of a process: which one it is, and whether it lives, as far as that can be told from here."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Process"]


@dataclass(frozen=True, slots=True)
class Process:
    """What tells a process from every other one, on any machine.

    `boot` is the boot of its machine, `namespace` that in which `pid` means something: both are empty where /proc is
    closed. `started` is in ticks since boot; None where the process is gone, or only its exit code is left.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str | None

    @classmethod
    def this(cls) -> Process:
        """Return the calling process; a forked one is another one."""
        pid = os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            boot = namespace = ""
        return cls(socket.gethostname(), boot, namespace, pid, _started(pid))

    @classmethod
    def of_json(cls, value: object) -> Process | None:
        """Return the process that `to_json` described, whatever lies beside it; None for anything else."""
        if not isinstance(value, dict) or not isinstance(value.get("pid"), int):
            return None
        texts = [value.get(key) for key in ("host", "boot", "namespace")]
        started = value.get("started")
        if not all(isinstance(text, str) for text in texts) or not isinstance(started, str | None):
            return None
        host, boot, namespace = map(str, texts)
        return cls(host, boot, namespace, value["pid"], started)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)

    def is_alive(self) -> bool | None:
        """Return whether the process lives; None where that can't be told from here: on another machine, in another
        namespace of process numbers, or where /proc is closed.
        """
        here = Process.this()
        if not here.boot or (self.host, self.boot, self.namespace) != (here.host, here.boot, here.namespace):
            return None
        return _started(self.pid) == self.started


def _started(pid: int) -> str | None:
    """Return when a process started. proc_pid_stat(5): field 3 is the state (Z: a zombie), field 22 the time."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X", "x") else fields[19]

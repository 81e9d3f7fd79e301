"""How much host memory there is to be had."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_nbytes"]

_UNLIMITED = 1 << 62
# Limit, use, and statistics of the two versions of control groups (Linux, Documentation/admin-guide/cgroup-v2.rst).
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def available_nbytes() -> int:
    """Return the bytes that this process could use before the machine or its container runs out of memory.

    It is the kernel's own estimate (`MemAvailable`) and what the container's limit leaves, whichever is less; files in
    the page cache count as available. A very large number where neither is told.
    """
    return min(_of_machine(), *(_of_group(*files) for files in _GROUPS))


def _of_machine() -> int:
    kilobytes = _field("/proc/meminfo", "MemAvailable:")
    return _UNLIMITED if kilobytes is None else kilobytes * 1024


def _of_group(limit_file: str, used_file: str, statistics: str) -> int:
    try:
        limit, used = Path(limit_file).read_text().strip(), Path(used_file).read_text().strip()
    except OSError:
        return _UNLIMITED
    if not limit.isdigit() or not used.isdigit():
        return _UNLIMITED  # "max"
    return max(0, int(limit) - int(used) + (_field(statistics, "inactive_file") or 0))


def _field(file: str, name: str) -> int | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None

"""Where tests of thousands of checkpoints put them: memory, where there is a file system of it."""

from pathlib import Path

__all__ = ["IN_MEMORY"]

IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None

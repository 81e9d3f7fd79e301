"""How a benchmark is run, the same for all of them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """`runs`: counted rounds, None for each benchmark's own number. `scale`: of the state's size, 1 being full.

    `folder` lies on the disk to measure. `only` restricts systems to those whose name contains one of the words;
    the limit and ckptengine are always measured. `timeout`: seconds for each process that is started.
    """

    folder: Path
    runs: int | None = None
    scale: float = 1.0
    only: tuple[str, ...] = ()
    timeout: float = 3600.0

    def rounds(self, default: int) -> int:
        """Return the number of counted rounds."""
        return default if self.runs is None else self.runs

    def wants(self, name: str) -> bool:
        """Return whether a peer of this name is to be measured."""
        return not self.only or any(word.lower() in name.lower() for word in self.only)

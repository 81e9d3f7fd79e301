"""What can go wrong, one class for each thing that a caller may want to treat differently."""

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "DeadlineError",
    "ForeignFormatError",
    "FormatVersionError",
    "LoadMismatchError",
    "Preempted",
    "RankFailedError",
    "ReplicaMismatchError",
    "RestoreDifferenceError",
    "RunInUseError",
    "SaveFailedError",
    "StateError",
    "StorageError",
]


class CheckpointError(Exception):
    """Base of every error that ckptengine raises on purpose."""


class StateError(CheckpointError, TypeError):
    """The state holds something that can't be saved or filled; the message names its path and type."""


class ReplicaMismatchError(StateError):
    """A replicated value differs between ranks; the message names the keys and the ranks."""


class LoadMismatchError(CheckpointError, ValueError):
    """The checkpoint and the state to fill don't fit: missing, unexpected or differing leaves.

    `report` is the `LoadReport` that names all of them, None where the trouble is another one.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class RestoreDifferenceError(CheckpointError, ValueError):
    """After a load the state is not what was saved; the message names the leaves, the rank, and what differs.

    The state has been changed: don't train on with it.
    """


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No committed checkpoint lies where one was asked for."""


class CheckpointDamagedError(CheckpointError, ValueError):
    """Bytes of a checkpoint are missing or are not those that were written; the message names file and place."""


class FormatVersionError(CheckpointError):
    """The checkpoint was written in a newer format than this version of ckptengine reads."""


class ForeignFormatError(CheckpointError, ValueError):
    """A checkpoint of another library holds something that is not read, or can't be written; nothing of it was run."""


class StorageError(CheckpointError, OSError):
    """The storage refused or failed; the message names file and operation, `errno` is the system's."""


class SaveFailedError(CheckpointError):
    """A save was not committed; the message names the ranks and their reasons. Earlier checkpoints stand."""


class RunInUseError(CheckpointError):
    """Another job that lives writes to the run; the message names its host and process."""


class RankFailedError(CheckpointError):
    """An operation failed on other ranks; the message names them and repeats their messages."""


class DeadlineError(CheckpointError, TimeoutError):
    """Something did not happen in time; the message names what was waited for and the ranks that are missing."""


class Preempted(SystemExit):
    """The job was told to end, and all ranks leave together; uncaught, it ends the process with `code`.

    Not a `CheckpointError`, nor an `Exception`: a training loop that goes on after errors must not go on after this.
    `step` is the step that was saved and is durable, None where nothing had to be or could be saved: then the newest
    committed checkpoint stands.
    """

    def __init__(self, message: str, code: int, step: int | None) -> None:
        super().__init__(code)
        self.message, self.step = message, step

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message, self.code, self.step)

    def __str__(self) -> str:
        return self.message

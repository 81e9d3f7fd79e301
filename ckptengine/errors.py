"""The errors of ckptengine, one class for each problem that a caller may want to handle differently."""

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "DeadlineError",
    "DeviceError",
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
    """Base class of ckptengine's errors."""


class StateError(CheckpointError, TypeError):
    """The state holds something that can't be saved or restored; the message names its path and type."""


class ReplicaMismatchError(StateError):
    """A replicated value differs between ranks; the message names the keys and the ranks."""


class LoadMismatchError(CheckpointError, ValueError):
    """The checkpoint and the state don't match: there are missing, unexpected or mismatched leaves.

    `report` is the `LoadReport` that lists all of them, or None if the problem is another one.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class RestoreDifferenceError(CheckpointError, ValueError):
    """After a load the state differs from the checkpoint; the message names the leaves, the rank, and what differs.

    The state has been changed: don't continue to train with it.
    """


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no committed checkpoint at the given place or step."""


class CheckpointDamagedError(CheckpointError, ValueError):
    """Bytes of a checkpoint are missing or differ from what was written; the message names the file and the place."""


class FormatVersionError(CheckpointError):
    """The checkpoint was written in a newer format than this version of ckptengine reads."""


class ForeignFormatError(CheckpointError, ValueError):
    """A checkpoint of another library holds something that is not read, or can't be written; no code in it was run."""


class StorageError(CheckpointError, OSError):
    """The storage failed or refused; the message names the file and the operation, `errno` is the system's."""


class SaveFailedError(CheckpointError):
    """A save was not committed; the message names the ranks and their errors. Earlier checkpoints are unchanged."""


class RunInUseError(CheckpointError):
    """Another running job writes to the run; the message names its host and process."""


class RankFailedError(CheckpointError):
    """An operation failed on other ranks; the message names them and repeats their messages."""


class DeviceError(CheckpointError):
    """A device failed or does not answer, or it or the host has no memory left; the message names the tensor, the bytes
    and the device, as far as they are known, and the rank.

    With `under_way` the device did not answer, and may still copy: the host's memory for that is never given back.
    """

    def __init__(self, message: str, under_way: bool = False) -> None:
        super().__init__(message)
        self.under_way = under_way


class DeadlineError(CheckpointError, TimeoutError):
    """Something did not happen in time; the message says what was awaited and names the missing ranks."""


class Preempted(SystemExit):
    """The job was told to end, and all ranks exit together; uncaught, it ends the process with the exit code `code`.

    It is a `SystemExit`, not an `Exception`: a training loop that continues after errors must not continue after this.
    `step` is the step that was saved and is durable. It is None if nothing had to be saved or could be saved: then the
    newest committed checkpoint stands.
    """

    def __init__(self, message: str, code: int, step: int | None) -> None:
        super().__init__(code)
        self.message, self.step = message, step

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message, self.code, self.step)

    def __str__(self) -> str:
        return self.message

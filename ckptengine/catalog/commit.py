"""The commit: after it the checkpoint exists, before it nothing does."""

from __future__ import annotations

from collections.abc import Collection

from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.listing import Entry, claimed_generations, manifest_name, read_manifest
from ckptengine.catalog.manifest import Manifest
from ckptengine.errors import SaveFailedError, StorageError
from ckptengine.storage.base import Storage, join
from ckptengine.storage.parallel import in_parallel

__all__ = ["attempt_directory", "check_file", "publish"]

_LOOKS = 8  # files that are looked up at once


def attempt_directory(directory: str, attempt: str) -> str:
    """Return where an attempt writes, below its checkpoint's directory."""
    return join(directory, f"data-{attempt}")


def publish(
    storage: Storage,
    directory: str,
    manifest: Manifest,
    ranks: Collection[int] | None = None,
    given_up: Collection[str] = (),
) -> None:
    """Commit an attempt: check once more that all its files are there, then publish the manifest.

    `ranks` are those whose archives lie on this very storage, None: all; the others lie on other nodes. `given_up` are
    earlier attempts of this process whose publication has failed, and may have come all the same: where one of them
    holds the place, it was told as failed, and this one, which is the same life's and whole, takes it in one operation.

    Raises `SaveFailedError` where a file is missing or has another size, where another attempt has committed the
    same step in the same generation, or where a later generation has been claimed: then this job's life is over. The
    files are looked up again after the publication: a writer that stood still before it may have been taken for dead,
    and its data been swept. Then the manifest is taken back.
    """
    later = [number for number in claimed_generations(storage) if number > manifest.generation]
    if later:
        raise SaveFailedError(
            f"this run was taken over by generation {max(later)}, this job writes generation "
            f"{manifest.generation}: end it, or restore and continue from what the other job has saved"
        )
    data = attempt_directory(directory, manifest.attempt)
    mine = [record for rank, record in enumerate(manifest.archives) if ranks is None or rank in ranks]
    records = *mine, manifest.layout

    threads = max(1, min(_LOOKS, len(records) // 2))

    def check() -> None:
        in_parallel(lambda record: check_file(storage, join(data, record.name), record), records, threads)

    check()
    name = join(directory, manifest_name(manifest.generation))
    if not storage.put_if_absent(name, manifest.encode()):
        winner = read_manifest(storage, Entry(manifest.step, manifest.generation, directory)).attempt
        if winner == manifest.attempt:
            return  # our own: the reply to the publication was lost on the way and it was tried again
        if winner not in given_up:
            raise SaveFailedError(
                f"{storage.location(name)} exists already: attempt {winner} has committed this step in this "
                f"generation. It is kept; attempt {manifest.attempt} is given up"
            )
        storage.write_bytes(name, manifest.encode())
    try:
        check()
    except SaveFailedError:
        storage.delete(name)
        raise
    except StorageError:
        pass  # it can't be looked at just now: the manifest is there, and a load checks the files


def check_file(storage: Storage, name: str, record: ArchiveRecord) -> None:
    """Check that a file of an attempt that was complete is still there; raises `SaveFailedError`."""
    size = storage.size(name)
    if size != record.nbytes:
        found = "is missing" if size is None else f"has {size} bytes instead of {record.nbytes}"
        raise SaveFailedError(
            f"{storage.location(name)} {found} before the commit; something else changes this directory"
        )

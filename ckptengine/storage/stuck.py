"""What a thread is doing in a storage: asked when it has taken too long, so that a call costs nothing extra."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import FrameType
from typing import Any

from ckptengine.errors import CheckpointError
from ckptengine.storage.base import ArchiveWriter, StorageView

__all__ = ["operation_of"]

_WORDS = {
    "abandon": "giving up an upload of",
    "check_writable": "looking up",
    "create": "opening",
    "create_archive": "creating",
    "delete": "deleting",
    "delete_tree": "deleting",
    "exists": "looking up",
    "finish": "finishing",
    "list": "listing",
    "load_archive": "reading",
    "make_directory": "making the directory",
    "modified": "looking up",
    "now": "asking for the time of",
    "put_if_absent": "publishing",
    "read_bytes": "reading",
    "read_range": "reading",
    "remove_directory": "deleting",
    "size": "looking up",
    "temporaries": "listing",
    "touch": "touching",
    "unfinished": "listing the uploads of",
    "write": "writing",
    "write_bytes": "writing",
}


def operation_of(thread: threading.Thread | None) -> str:
    """Return the storage call that a thread is inside of, as "writing /run/step-…/rank-00000.zarr.zip"; "" for none."""
    frame = None if thread is None or thread.ident is None else sys._current_frames().get(thread.ident)
    found = ""
    while frame is not None:  # from the innermost call outwards: the outermost one has the name that was asked for
        found = _named(frame) or found
        frame = frame.f_back
    return found


def _named(frame: FrameType) -> str:
    word = _WORDS.get(frame.f_code.co_name)
    here: Any = None if word is None else frame.f_locals.get("self")
    if isinstance(here, ArchiveWriter):
        return f"{word} {here.where}"
    if isinstance(here, StorageView):
        name = frame.f_locals.get("name", frame.f_locals.get("directory", ""))
        with contextlib.suppress(CheckpointError):  # no name within a storage
            place = here.location(name if isinstance(name, str) else "")
            return f"{word} {place} at {here.endpoint}" if here.endpoint else f"{word} {place}"
    return ""

"""The manifest: the commit record of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from ckptengine.archive.record import ArchiveRecord
from ckptengine.errors import CheckpointDamagedError, FormatVersionError, StateError

__all__ = [
    "ATTEMPT",
    "FORMAT_VERSION",
    "MAX_MANIFEST_NBYTES",
    "Manifest",
    "checked_metadata",
    "checked_record",
    "plain_json",
    "utc_now",
    "writer_version",
]

FORMAT_VERSION = 1
MAX_MANIFEST_NBYTES = 64 << 20
"""Larger ones are refused unread: 16,384 archives take 3 MiB, the rest is room for the user's metadata."""

ATTEMPT = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{3,63}")
"""What attempt ids look like; they become part of directory names and of keys."""
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ALIGNMENT = 4096
_MAX_BLOCK_NBYTES = 1 << 30
_MAX_NUMBER = 2**63 - 1
_TOO_DEEP = "metadata: nested too deep, or inside itself; make it flat"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint consists of.

    `step` is None for a checkpoint outside of a run. `parent` is the (generation, step) that this life of
    the run was restored from, None for a fresh start. `archives` has one record per rank, in rank order; the
    files lie in `data-<attempt>` beside the manifest. `block_nbytes` is the size of the blocks that the
    archives' checksums cover. `metadata` is the user's, plain JSON. `metrics` are what the training said of itself when
    this was saved, None for what was not finite. `value_ranks` are the ranks besides 0 in whose archives a part of the
    shared plain values lies, ascending.
    `created` is UTC, ISO 8601; `writer` the program and its version.
    """

    step: int | None
    generation: int
    parent: tuple[int, int] | None
    attempt: str
    world_size: int
    block_nbytes: int
    archives: tuple[ArchiveRecord, ...]
    layout: ArchiveRecord
    metadata: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    created: str = field(default_factory=lambda: utc_now())
    writer: str = field(default_factory=lambda: writer_version())
    format_version: int = FORMAT_VERSION
    value_ranks: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files together, without the manifest."""
        return self.layout.nbytes + sum(record.nbytes for record in self.archives)

    def encode(self) -> bytes:
        """Return the manifest as canonical JSON with its own digest, field `sha256`.

        Raises `StateError` where metadata is not plain JSON, or nested deeper than the stack of this call allows.
        """
        try:
            return self._encode()
        except RecursionError:
            raise StateError(_TOO_DEEP) from None

    def _encode(self) -> bytes:
        plain_json(self.metadata, "metadata")
        document: dict[str, Any] = {
            "format_version": self.format_version,
            "step": self.step,
            "generation": self.generation,
            "parent": None if self.parent is None else list(self.parent),
            "attempt": self.attempt,
            "world_size": self.world_size,
            "block_nbytes": self.block_nbytes,
            "archives": [_document_of(record) for record in self.archives],
            "layout": _document_of(self.layout),
            "metadata": self.metadata,
            **({"metrics": self.metrics} if self.metrics else {}),
            **({"value_ranks": list(self.value_ranks)} if self.value_ranks else {}),
            "created": self.created,
            "writer": self.writer,
        }
        document["sha256"] = hashlib.sha256(_canonical(document)).hexdigest()
        data = _canonical(document)
        if len(data) > MAX_MANIFEST_NBYTES:
            raise StateError(
                f"the manifest would have {len(data)} bytes, at most {MAX_MANIFEST_NBYTES} are read: "
                "make the metadata smaller"
            )
        return data

    @classmethod
    def decode(cls, data: bytes, where: str) -> Manifest:
        """Return the manifest in `data`; `where` names the file in errors.

        Fields that this version doesn't know are ignored; the digest covers them. Raises `FormatVersionError`
        for a newer format, `CheckpointDamagedError` for everything else that is not a whole manifest.
        """
        document = parse_document(data, where)
        # The digest first: a flipped bit must not pass for a newer version, which no other copy could replace.
        digest = document.pop("sha256", None)
        version = document.get("format_version")
        newer = type(version) is int and version > FORMAT_VERSION
        try:
            written = hashlib.sha256(_canonical(document)).hexdigest()
        except RecursionError:
            raise CheckpointDamagedError(f"{where}: {_TOO_DEEP}") from None
        if digest != written:
            claim = f", and it claims the unknown format version {version}" if newer else ""
            raise CheckpointDamagedError(f"{where}: the manifest is not what was written (its SHA-256 differs{claim})")
        if newer:
            raise FormatVersionError(
                f"{where}: format version {version} is newer than version {FORMAT_VERSION}, the newest "
                "that this ckptengine reads: upgrade ckptengine to load this checkpoint"
            )
        get = _Fields(document, where)
        manifest = cls(
            format_version=get("format_version", _positive),
            step=get("step", _optional(_natural)),
            generation=get("generation", _positive),
            parent=get("parent", _optional(parent_of)),
            attempt=get("attempt", _matching(ATTEMPT)),
            world_size=get("world_size", _positive),
            block_nbytes=get("block_nbytes", _block_nbytes),
            archives=get("archives", _records),
            layout=get("layout", checked_record),
            metadata=get("metadata", _object),
            metrics=get("metrics", _metrics) if "metrics" in document else {},
            created=get("created", _time),
            writer=get("writer", _text),
            value_ranks=get("value_ranks", _ranks) if "value_ranks" in document else (),
        )
        if manifest.value_ranks and manifest.value_ranks[-1] >= manifest.world_size:
            raise CheckpointDamagedError(f"{where}: field 'value_ranks': rank {manifest.value_ranks[-1]} did not save")
        names = {record.name for record in (manifest.layout, *manifest.archives)}
        if len(manifest.archives) != manifest.world_size or len(names) != manifest.world_size + 1:
            raise CheckpointDamagedError(
                f"{where}: world size {manifest.world_size} wants as many archives and a layout, each with a "
                f"name of its own; {len(manifest.archives)} archives are listed, {len(names)} names in all"
            )
        return manifest


class _Fields:
    """Takes fields out of a document, each through its check."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self._document = document
        self._where = where

    def __call__(self, name: str, check: Callable[[Any], _T]) -> _T:
        if name not in self._document:
            raise CheckpointDamagedError(f"{self._where}: field {name!r} is missing")
        try:
            return check(self._document[name])
        except ValueError as error:
            raise CheckpointDamagedError(f"{self._where}: field {name!r}: {error}") from None


def parse_document(data: bytes, where: str) -> dict[str, Any]:
    """Return a JSON object; raises `CheckpointDamagedError` for anything else, a name twice included."""
    if len(data) > MAX_MANIFEST_NBYTES:
        raise CheckpointDamagedError(f"{where}: {len(data)} bytes, a manifest has at most {MAX_MANIFEST_NBYTES}")
    try:
        document = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where}: not JSON: {str(error) or type(error).__name__}") from None
    if type(document) is not dict:
        raise CheckpointDamagedError(f"{where}: not a JSON object but {type(document).__name__}")
    return document


def checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a user's metadata as the manifest takes it; raises `StateError` where it is not plain JSON."""
    result = dict(metadata or {})
    try:
        plain_json(result, "metadata")
    except RecursionError:
        raise StateError(_TOO_DEEP) from None
    return result


def plain_json(value: object, name: str) -> None:
    """Check that a value is plain JSON: None, bool, int, finite float, str, lists, and dicts with str keys.

    Raises `StateError` naming the place.
    """
    kind = type(value)
    if value is None or kind in (bool, str):
        return
    if isinstance(value, int) and kind is int and -_MAX_NUMBER <= value <= _MAX_NUMBER:
        return
    if isinstance(value, float) and kind is float and value - value == 0:
        return
    if isinstance(value, list | tuple):
        for number, item in enumerate(value):
            plain_json(item, f"{name}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise StateError(f"{name}: key {key!r} is {type(key).__name__}; JSON wants str keys")
            plain_json(item, f"{name}[{key!r}]")
    else:
        raise StateError(
            f"{name} is {kind.__name__} {value!r:.80}; the manifest holds plain JSON only: None, bool, int "
            "of 64 bits, finite float, str, and lists and dicts of these"
        )


def checked_record(value: Any) -> ArchiveRecord:
    """Return an archive's record from its JSON form; raises `ValueError` where it isn't sane."""
    if type(value) is not dict:
        raise ValueError(f"expected an object, found {value!r:.80}")
    name, nbytes = value.get("name"), _natural(value.get("nbytes"))
    position, digest = _natural(value.get("tail_position")), value.get("tail_sha256")
    if type(name) is not str or not _FILE.fullmatch(name):
        raise ValueError(f"{name!r:.80} is not a plain file name")
    if position > nbytes or position % _ALIGNMENT:
        raise ValueError(f"{name}: the tail can't start at byte {position} of {nbytes}")
    return ArchiveRecord(name, nbytes, position, _matching(_SHA256)(digest))


def parent_of(value: Any) -> tuple[int, int]:
    """Return a parent, (generation, step), from its JSON form; raises `ValueError`."""
    if type(value) is not list or len(value) != 2:
        raise ValueError(f"[generation, step] was expected, found {value!r:.80}")
    return _positive(value[0]), _natural(value[1])


def utc_now() -> str:
    """Return the time as manifests tell it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def writer_version() -> str:
    """Return the name and version of this program."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"ckptengine {version('ckptengine')}"
    except PackageNotFoundError:
        # Run from a source tree that is not installed.
        return "ckptengine"


def _document_of(record: ArchiveRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "nbytes": record.nbytes,
        "tail_position": record.tail_position,
        "tail_sha256": record.tail_sha256,
    }


def _canonical(document: Mapping[str, Any]) -> bytes:
    """Return JSON in its one form: sorted names, no spaces, ASCII only."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is more than a float holds")
    return number


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise ValueError(f"an integer from 0 on was expected, found {value!r:.80}")
    return value


def _positive(value: Any) -> int:
    if _natural(value) == 0:
        raise ValueError("an integer from 1 on was expected, 0 found")
    return int(value)


def _ranks(value: Any) -> tuple[int, ...]:
    if type(value) is not list or sorted({_positive(rank) for rank in value}) != value:
        raise ValueError(f"ranks from 1 on, ascending, were expected, {value!r:.100} found")
    return tuple(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"text was expected, found {value!r:.80}")
    return value


def _time(value: Any) -> str:
    datetime.fromisoformat(_text(value))
    return str(value)


def _metrics(value: Any) -> dict[str, float | None]:
    if type(value) is not dict or not all(one is None or type(one) in (int, float) for one in value.values()):
        raise ValueError(f"{value!r:.100} is no object of numbers")
    return value


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"expected an object, found {value!r:.80}")
    return value


def _block_nbytes(value: Any) -> int:
    if not 0 < _natural(value) <= _MAX_BLOCK_NBYTES or value % _ALIGNMENT:
        raise ValueError(f"a multiple of {_ALIGNMENT} up to {_MAX_BLOCK_NBYTES} was expected, {value} found")
    return int(value)


def _records(value: Any) -> tuple[ArchiveRecord, ...]:
    if type(value) is not list:
        raise ValueError(f"a list was expected, found {value!r:.80}")
    return tuple(map(checked_record, value))


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is not str or not pattern.fullmatch(value):
            raise ValueError(f"{value!r:.80} does not match {pattern.pattern}")
        return value

    return check


def _optional(check: Callable[[Any], _T]) -> Callable[[Any], _T | None]:
    return lambda value: None if value is None else check(value)

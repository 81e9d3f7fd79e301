"""What is known of each rank's random streams, and what becomes of them at another number of ranks: pure functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Record", "digest_of", "new_seed", "shared_streams"]

_DOMAIN = "ckptengine random stream 1"
"""Changed with the rule: two rules never lead to the same streams."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one rank says of its streams, without their states.

    `streams` are kinds and digests by name. `key` is the one that was given to `RNG`, `resumed` how often the streams
    were loaded before, `found` which the ranks were found to share when their number last changed.
    """

    key: int | None
    resumed: int
    found: frozenset[str]
    streams: dict[str, tuple[str, str]]

    def as_value(self) -> dict[str, Any]:
        """Return the record as plain values."""
        streams = {name: f"{kind} {digest}" for name, (kind, digest) in self.streams.items()}
        return {"key": self.key, "resumed": self.resumed, "found_shared": sorted(self.found), "streams": streams}

    @classmethod
    def of_value(cls, value: Any) -> Record:
        """Return the record that plain values stand for; raises `ValueError` for anything else."""
        try:
            key, resumed, found = value["key"], value["resumed"], value["found_shared"]
            streams = {name: _split(text) for name, text in value["streams"].items()}
            texts = (*found, *streams)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{value!r:.120}") from error
        if (
            type(key) not in (int, type(None))
            or type(resumed) is not int
            or any(type(text) is not str for text in texts)
        ):
            raise ValueError(f"{value!r:.120}")
        return cls(key, resumed, frozenset(found), streams)


def _split(text: str) -> tuple[str, str]:
    kind, _, digest = text.rpartition(" ")
    return kind, digest


def digest_of(kind: str, data: NDArray[np.uint8]) -> str:
    """Return the SHA-256 of a stream's kind and state, as hexadecimal digits."""
    sha = hashlib.sha256(kind.encode() + b"\0")
    sha.update(np.ascontiguousarray(data))
    return sha.hexdigest()


def shared_streams(records: Sequence[Record], declared: Iterable[str]) -> frozenset[str]:
    """Return the names of the streams that ranks share, given the records of all of them, and what is declared shared.

    Those are the ones that two ranks or more had, all of them in the same state. Ranks with one key say no more than a
    single one; then what was found before holds.
    """
    keys = {("rank", rank) if record.key is None else ("key", record.key) for rank, record in enumerate(records)}
    first = records[0]
    if len(keys) < 2:
        return first.found | frozenset(declared)
    same = {name for name, stream in first.streams.items() if all(r.streams.get(name) == stream for r in records)}
    return frozenset(same) | frozenset(declared)


def new_seed(name: str, records: Sequence[Record], who: Mapping[str, int], world_size: int) -> bytes:
    """Return the 32 bytes from which a stream begins anew on one rank.

    Takes the stream's name, the records of all ranks that saved, in their order (where the stream is in none of them,
    those that are known), and who it is for: `{"rank": 3}`, `{"key": 1}`, or `{}` for all ranks alike.
    """
    digests = [record.streams[name][1] if name in record.streams else None for record in records]
    resumed = max(record.resumed for record in records)
    if not any(digests):
        digests = []  # what is new is the same to ranks that know all records and to those that know one
    text = json.dumps([_DOMAIN, name, digests, resumed, sorted(who.items()), world_size], ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()

"""Rank 0's part in a save's background: compare the receipts, write the layout, publish the manifest."""

from __future__ import annotations

from collections.abc import Sequence

from ckptengine.archive.layout_file import encode_layout
from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.receipt import Receipt
from ckptengine.errors import SaveFailedError
from ckptengine.layout.merge import merge
from ckptengine.layout.rank_rows import PackedRows
from ckptengine.save.replicas import compare_replicas
from ckptengine.save.values import compare_values
from ckptengine.schema.ranks import name_ranks

__all__ = ["Coordinator"]


class Coordinator:
    """Keeps what the ranks said of their plans, so that later receipts need not repeat it."""

    def __init__(self, world_size: int) -> None:
        self._rows: list[PackedRows | None] = [None] * world_size
        self._layout: tuple[bytes, ArchiveRecord] | None = None

    def expected(self) -> tuple[bytes, ArchiveRecord] | None:
        """Return the layout file and record that the next receipts will make unless they bring other rows."""
        return self._layout

    def layout(self, receipts: Sequence[Receipt]) -> tuple[bytes, ArchiveRecord]:
        """Return the layout file of these receipts and its record; made anew only where a plan has changed.

        Raises `ReplicaMismatchError` where replicated values differ, `SaveFailedError` where the ranks' parts don't
        make whole leaves.
        """
        _compare(receipts)
        changed = [receipt for receipt in receipts if receipt.rows]
        for receipt in changed:
            self._rows[receipt.rank] = PackedRows.decode(receipt.rows)
        if changed or self._layout is None:
            self._layout = None
            unknown = [rank for rank, rows in enumerate(self._rows) if rows is None]
            if unknown:
                raise SaveFailedError(f"{name_ranks(unknown)} did not say where the parts lie; save again")
            self._layout = encode_layout(merge([rows for rows in self._rows if rows is not None]))
        return self._layout


def _compare(receipts: Sequence[Receipt]) -> None:
    """Compare what the ranks say of what they all hold."""
    places = {receipt.rank: receipt.directory for receipt in receipts}
    others = {rank: place for rank, place in places.items() if place != places[0]}
    if others:
        rank, place = next(iter(others.items()))
        raise SaveFailedError(
            f"the ranks are not at the same step: rank 0 saves {places[0]!r}, rank {rank} saves {place!r}; all ranks "
            "must call save and step with the same steps in the same order"
        )
    compare_values([(receipt.value_paths, receipt.digests) for receipt in receipts])
    compare_replicas([([receipt.rank], receipt.replica_crcs) for receipt in receipts])

"""Rank 0's part in a save's background: compare the receipts, write the layout, publish the manifest."""

from __future__ import annotations

from collections.abc import Sequence

from ckptengine.archive.layout_file import encode_layout
from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.receipt import Receipt
from ckptengine.errors import SaveFailedError
from ckptengine.layout.merge import merge
from ckptengine.layout.rank_rows import PackedRows
from ckptengine.save.form import SharedForm, check_forms, decode_form
from ckptengine.save.replicas import compare_replicas
from ckptengine.save.shares import Shares, owners_of
from ckptengine.save.some_ranks import check_nesting, objects_with_values_in_part
from ckptengine.save.values import compare_values
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.ranks import name_ranks

__all__ = ["Coordinator"]


class Coordinator:
    """Keeps what the ranks said of their plans, so that later receipts need not repeat it."""

    def __init__(self, world_size: int) -> None:
        self._rows: list[PackedRows | None] = [None] * world_size
        self._layout: tuple[bytes, ArchiveRecord] | None = None
        self._forms: tuple[Shares | None, dict[str, SharedForm]] = (None, {})  # since that exchange, by their digests
        self._nested: tuple[object, set[tuple[Path, ...]]] | None = None  # of which it is known that they fit
        self._shared: tuple[Shares, set[tuple[Path, ...]]] | None = None  # of which `untold` is known
        self.untold = False
        """Whether some ranks' objects have plain items that others' have not, and these don't know of it yet."""

    def expected(self) -> tuple[bytes, ArchiveRecord] | None:
        """Return the layout file and record that the next receipts will make unless they bring other rows."""
        return self._layout

    def put_together(self, receipts: Sequence[Receipt], shares: Shares) -> tuple[bytes, ArchiveRecord, tuple[int, ...]]:
        """Return the layout file of these receipts, its record, and the ranks besides 0 that store shared values.

        The layout is made anew only where a plan has changed. `shares` are rank 0's. Raises `ReplicaMismatchError`
        where replicated values differ, `SaveFailedError` where the ranks' parts don't make whole leaves.
        """
        paths_of = _compare(receipts)
        changed = [receipt for receipt in receipts if receipt.rows]
        for receipt in changed:
            self._rows[receipt.rank] = PackedRows.decode(receipt.rows)
        if changed or self._layout is None:
            self._layout = None
            unknown = [rank for rank, rows in enumerate(self._rows) if rows is None]
            if unknown:
                raise SaveFailedError(f"{name_ranks(unknown)} did not say where the parts lie; save again")
            self._layout = encode_layout(merge([rows for rows in self._rows if rows is not None]))
        if len(paths_of) > 1:
            self._check_nesting(set(paths_of))
        ranks = {receipt.rank for receipt in receipts if receipt.stores}
        first = sorted(paths_of.items(), key=lambda item: item[1].rank)
        said = [(one.rank, paths, frozenset(paths[n] for n in one.fresh)) for paths, one in first]
        ranks |= owners_of(shares, said) | self._new_forms(receipts, shares)
        self._look_for_untold(set(paths_of), shares)
        return (*self._layout, tuple(sorted(ranks)))

    def _look_for_untold(self, paths_of: set[tuple[Path, ...]], shares: Shares) -> None:
        if self._shared is not None and self._shared[0] is shares and self._shared[1] == paths_of:
            return
        forms = (*shares.forms, *self._forms[1].values())
        objects = {one.path for form in forms for one in form.outline.containers if one.kind == "object"}
        self.untold = len(paths_of) > 1 and not objects_with_values_in_part(objects, paths_of) <= shares.in_part
        self._shared = shares, paths_of

    def _new_forms(self, receipts: Sequence[Receipt], shares: Shares) -> set[int]:
        """Return the ranks besides 0 that store a form of which the exchange has not told, the lowest of each.

        Raises `SaveFailedError` where what a rank has stored, and another one has, may be missing now, so that the
        ranks are to tell each other at the next save; `ReplicaMismatchError` where forms don't fit each other.
        """
        if self._forms[0] is not shares:
            self._forms = shares, {}
        forms = self._forms[1]
        first: dict[str, int] = {}
        changed: dict[tuple[int, str], int] = {}  # the lowest rank that had one form then and has another one now
        for receipt in receipts:
            if receipt.form_digest:
                first.setdefault(receipt.form_digest, receipt.rank)
                changed.setdefault((shares.form_of_rank[receipt.rank], receipt.form_digest), receipt.rank)
                if receipt.form and receipt.form_digest not in forms:
                    forms[receipt.form_digest] = decode_form(receipt.form)
        if first:
            kept = {shares.form_of_rank[one.rank]: one.rank for one in reversed(receipts) if not one.form_digest}
            now = [(rank, shares.forms[number]) for number, rank in kept.items()]
            now += [(rank, forms[digest]) for digest, rank in first.items()]
            check_forms(sorted(now, key=lambda one: one[0]))
            for (number, digest), rank in changed.items():
                lost = shares.forms[number].things() - forms[digest].things()
                if lost and any(not lost.isdisjoint(form.things()) for _, form in now):
                    raise SaveFailedError(_apart(rank, min(lost, key=str)[1]))
        return {rank for rank in first.values() if rank != 0}

    def _check_nesting(self, paths_of: set[tuple[Path, ...]]) -> None:
        """Compare where arrays and values lie, where any is new since the last time."""
        if self._nested is not None and self._nested[0] is self._layout and self._nested[1] == paths_of:
            return
        tables = {id(rows.leaves): rows.leaves for rows in self._rows if rows is not None}
        shared = (leaf for leaves in tables.values() for leaf in leaves if leaf.placement is not Placement.PER_RANK)
        check_nesting({leaf.path for leaf in shared}, paths_of)
        self._nested = self._layout, paths_of


def _compare(receipts: Sequence[Receipt]) -> dict[tuple[Path, ...], Receipt]:
    """Compare what the ranks say of what they share; return the receipt of the lowest rank for each list of paths."""
    places = {receipt.rank: receipt.directory for receipt in receipts}
    others = {rank: place for rank, place in places.items() if place != places[0]}
    if others:
        rank, place = next(iter(others.items()))
        raise SaveFailedError(
            f"the ranks are not at the same step: rank 0 saves {places[0]!r}, rank {rank} saves {place!r}; all ranks "
            "must call save and step with the same steps in the same order"
        )
    paths_of: dict[tuple[Path, ...], Receipt] = {}
    ranks_of: dict[tuple[tuple[Path, ...], bytes], list[int]] = {}
    for receipt in receipts:
        paths_of.setdefault(receipt.value_paths, receipt)
        ranks_of.setdefault((receipt.value_paths, receipt.digests), []).append(receipt.rank)
    if len(ranks_of) > 1:
        compare_values([(ranks, *said) for said, ranks in ranks_of.items()])
    compare_replicas([([receipt.rank], receipt.replica_crcs) for receipt in receipts])
    return paths_of


def _apart(rank: int, path: Path) -> str:
    return (
        f"{dotted(path)}: rank {rank} had it when the ranks last told each other what they have, and does not have it, "
        "or not in the same way, any more; others still do. The save was not committed. They tell each other at the "
        "next one: save again"
    )

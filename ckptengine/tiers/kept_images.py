"""Commits in the memory tier of a node, of the images that lie there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ckptengine.save.attempt import Attempt, Target
from ckptengine.tiers.claims import Claims
from ckptengine.tiers.memory import MemoryTier
from ckptengine.tiers.messages import Messages
from ckptengine.tiers.places import MemoryNode

__all__ = ["KeptImages"]


@dataclass(frozen=True, slots=True)
class KeptImages:
    """Where a saver commits its snapshots before they are durable."""

    node: MemoryNode
    claims: Claims
    messages: Messages | None

    @property
    def images(self) -> MemoryTier:
        """The tier that has the memory."""
        return self.node.tier

    def target(self, attempt: Attempt) -> Target:
        """Return where an attempt is committed in memory; called when its snapshot is complete, before that commit."""
        storage, site = self.node.storage, self.node.site
        if site.leads:
            self.claims.copy_to(storage, attempt.generation)
            self.images.withdraw(attempt.target.directory, attempt.generation, attempt.name)
        rendezvous = None if self.messages is None else self.messages.rendezvous(storage, site)
        return replace(attempt.target, storage=storage, site=site, rendezvous=rendezvous)

"""What a Checkpointer is asked for, checked once and then only read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckptengine.catalog.keep import Best
from ckptengine.catalog.manifest import checked_metadata
from ckptengine.comm.base import Communicator
from ckptengine.policy.arguments import (
    checked_choice,
    checked_comm,
    checked_count,
    checked_location,
    checked_policy,
    checked_preemption,
    checked_seconds,
)
from ckptengine.policy.exporting import Export, exporter_of, hooks_of
from ckptengine.policy.hook import Commit, CommitHook, CommitHooks
from ckptengine.policy.interval import Auto
from ckptengine.policy.preemption import Preemption
from ckptengine.policy.rules import Every, Policy
from ckptengine.save.replicas import ReplicaCheck, replica_check
from ckptengine.snapshot.snapshotter import LEAST_ARENA_NBYTES
from ckptengine.tiers.places import Places
from ckptengine.tiers.tiers import Tiers

__all__ = ["Settings", "tiers_of"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments of a Checkpointer, as it explains them. `of` checks them, and puts together what they stand for.

    `policy` has a rule more where checkpoints are exported. `hooks` are all that is called with each commit,
    `exporting` that of the exports, which is told of a restore, too. `comm` is None for the one of what is initialized.
    """

    run: str
    local: str | None
    memory: bool | str | os.PathLike[str]
    policy: Policy
    hooks: CommitHooks
    exporting: CommitHook | None
    preemption: Preemption | None
    raises: bool
    max_failures: int
    skips: bool
    check_replicas: ReplicaCheck
    overlap: bool
    arena_nbytes: int | None
    metadata: Mapping[str, Any]
    timeout: float
    comm: Communicator | None
    storage_options: Mapping[str, Any] | None = field(repr=False)  # may hold credentials
    upload_bytes_per_second: float | None

    @classmethod
    def of(
        cls,
        *,
        run: str | os.PathLike[str],
        every: int | str | Auto | None,
        keep_last: int | Mapping[str, int] | None,
        local: str | os.PathLike[str] | None,
        memory: bool | str | os.PathLike[str],
        keep_every: int | None,
        keep_best: str | Best | Sequence[str | Best] | None,
        policy: Policy | None,
        preemption: Preemption | None,
        on_error: str,
        max_failures: int,
        when_busy: str,
        check_replicas: str | bool,
        overlap: bool,
        arena_nbytes: int | None,
        metadata: Mapping[str, Any] | None,
        on_commit: Callable[[Commit], object] | None,
        export_every: int | None,
        export: Export | None,
        timeout: float,
        comm: Communicator | None,
        storage_options: Mapping[str, Any] | None,
        upload_bytes_per_second: float | None,
    ) -> Settings:
        """Return the settings; raises `TypeError` or `ValueError` naming the argument, what is expected and found."""
        run = checked_location("run", run)
        policy = checked_policy(policy, every, keep_last, keep_every, keep_best)
        if memory not in (True, False):
            checked_location("memory", memory)
        if local is not None:
            local = checked_location("local", local)
        checked_choice("on_error", on_error, ("warn", "raise"))
        checked_choice("when_busy", when_busy, ("wait", "skip"))
        max_failures = checked_count("max_failures", max_failures, 1, "how many failed saves in a row raise")
        if arena_nbytes is not None:
            arena_nbytes = checked_count("arena_nbytes", arena_nbytes, LEAST_ARENA_NBYTES, "bytes (None: all)")
        if arena_nbytes is not None and memory:
            raise ValueError("arena_nbytes bounds the snapshot's memory, memory=True keeps two whole ones: give one")
        timeout = checked_seconds("timeout", timeout)
        preemption, comm = checked_preemption(preemption), checked_comm(comm)
        check, checked = replica_check(check_replicas), checked_metadata(metadata)
        exporter = exporter_of(export_every, export, storage_options, timeout)
        if exporter is not None:
            policy = replace(policy, save=(*policy.save_rules, Every(exporter.every)))
        hooks, exporting = hooks_of(on_commit, exporter)
        return cls(
            run=run,
            local=local,
            memory=memory,
            policy=policy,
            hooks=hooks,
            exporting=exporting,
            preemption=preemption,
            raises=on_error == "raise",
            max_failures=max_failures,
            skips=when_busy == "skip",
            check_replicas=check,
            overlap=overlap,
            arena_nbytes=arena_nbytes,
            metadata=checked,
            timeout=timeout,
            comm=comm,
            storage_options=storage_options,
            upload_bytes_per_second=upload_bytes_per_second,
        )


def tiers_of(settings: Settings, comm: Communicator) -> Tiers:
    """Return the tiers that a run is to have; nothing of them is opened."""
    places = Places(settings.run, settings.local, settings.memory, settings.storage_options, settings.timeout)
    return Tiers(
        places,
        comm,
        settings.timeout,
        keep=settings.policy.keep_rules,
        upload_bytes_per_second=settings.upload_bytes_per_second,
        tell_uploaded=settings.hooks.uploaded,
        in_use=settings.hooks.protected,
    )

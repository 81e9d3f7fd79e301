"""Claims of a run's lives, by processes that race."""

import json
import multiprocessing

import pytest
from checkpoints import write_checkpoint

from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.listing import read_claim
from ckptengine.errors import CheckpointDamagedError, FormatVersionError, StorageError
from ckptengine.storage.local import LocalStorage


def test_generations_count_from_one_on_and_tell_their_parents(storage):
    assert claim_generation(storage, None) == 1
    assert claim_generation(storage, (1, 100)) == 2
    assert read_claim(storage, 1) is None
    assert read_claim(storage, 2) == (1, 100)
    assert storage.list() == ["generation-0001.json", "generation-0002.json"]


def test_the_next_comes_after_claims_and_manifests(storage):
    write_checkpoint(storage, 10, 7)
    assert claim_generation(storage, (7, 10)) == 8


def _claim(root, barrier, results):
    storage = LocalStorage(root)
    barrier.wait(60)
    results.put([claim_generation(storage, None) for _ in range(5)])


def test_racing_claimers_get_different_generations(storage):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    claimers = [context.Process(target=_claim, args=(storage.root, barrier, results)) for _ in range(4)]
    for claimer in claimers:
        claimer.start()
    claimed = [generation for _ in claimers for generation in results.get(timeout=60)]
    for claimer in claimers:
        claimer.join(30)
    assert sorted(claimed) == list(range(1, 21))


@pytest.mark.parametrize(
    "claim",
    [b"", b"[]", {"generation": 2}, {"parent": [0, 0]}, {"parent": "x"}, {"format_version": "1"}],
    ids=str,
)
def test_a_damaged_claim_is_told(storage, claim):
    good = {"format_version": 1, "generation": 1, "parent": None}
    storage.write_bytes(
        "generation-0001.json", claim if isinstance(claim, bytes) else json.dumps(good | claim).encode()
    )
    with pytest.raises(CheckpointDamagedError, match=r"generation-0001\.json"):
        read_claim(storage, 1)


def test_a_newer_claim_is_told(storage):
    storage.write_bytes("generation-0001.json", b'{"format_version": 2}')
    with pytest.raises(FormatVersionError):
        read_claim(storage, 1)
    with pytest.raises(StorageError):
        read_claim(storage, 2)

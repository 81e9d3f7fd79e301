"""Claims of a run's lives, by processes that race."""

import errno
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


class FailingOnce(LocalStorage):
    """A storage whose first claim fails, after it has come to be or before."""

    def __init__(self, root, done):
        super().__init__(root)
        self.done, self.claims, self.unreadable = done, [], False

    def put_if_absent(self, name, data):
        self.claims.append(bytes(data))
        if len(self.claims) == 1:
            if self.done:
                super().put_if_absent(name, data)
            raise StorageError(errno.EIO, f"cannot sync the directory {self.root}: Input/output error")
        return super().put_if_absent(name, data)

    def read_bytes(self, name, limit):
        if self.unreadable:
            raise StorageError(errno.EIO, f"cannot read {self.location(name)}: Input/output error")
        return super().read_bytes(name, limit)


def claims_in(storage):
    return {name: storage.read_bytes(name, 4096) for name in storage.list() if name.startswith("generation-")}


def test_a_claim_that_failed_after_it_had_come_to_be_is_ours(tmp_path, storage):
    home = FailingOnce(tmp_path / "home", done=True)
    assert claim_generation(home, None, [storage], storage) == 1
    assert len(home.claims) == 1
    assert claims_in(home) == claims_in(storage) != {}


def test_a_claim_that_failed_after_it_had_come_to_be_is_ours_where_there_is_no_other_place(tmp_path):
    home = FailingOnce(tmp_path / "home", done=True)
    assert claim_generation(home, (1, 5)) == 1
    assert len(home.claims) == 1
    assert list(claims_in(home)) == ["generation-0001.json"]


def test_a_claim_of_which_nothing_is_known_is_made_again_elsewhere_as_the_very_same(tmp_path, storage):
    home = FailingOnce(tmp_path / "home", done=True)
    home.unreadable = True
    assert claim_generation(home, None, [storage], storage) == 1
    home.unreadable = False
    assert claims_in(home) == claims_in(storage) != {}


def test_a_claim_that_failed_before_it_came_to_be_is_made_elsewhere(tmp_path, storage):
    home = FailingOnce(tmp_path / "home", done=False)
    assert claim_generation(home, (1, 5), [storage], storage) == 1
    assert read_claim(storage, 1) == (1, 5)
    assert claims_in(home) == {}


def test_a_claim_that_is_not_there_is_an_error_where_there_is_no_other_place(tmp_path):
    home = FailingOnce(tmp_path / "home", done=False)
    with pytest.raises(StorageError, match="Input/output error"):
        claim_generation(home, None)
    assert claim_generation(home, None) == 1

"""The manifest, as it is written and as it may come back."""

import contextlib
import dataclasses
import hashlib
import json

import pytest
from checkpoints import manifest_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.catalog.manifest import FORMAT_VERSION, Manifest
from ckptengine.errors import CheckpointDamagedError, CheckpointError, FormatVersionError, StateError

GOOD = manifest_of(100, 2, (1, 90), metadata={"loss": 0.25, "ä": [1, None]})


def signed(**changes):
    """Return the manifest with other fields (`...`: without) and a digest that fits them."""
    document = json.loads(GOOD.encode()) | changes
    document = {name: value for name, value in document.items() if value is not ...}
    del document["sha256"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return json.dumps(document | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def record(**changes):
    return {"name": "x.zip", "nbytes": 8192, "tail_position": 4096, "tail_sha256": "0" * 64} | changes


def test_a_manifest_comes_back_equal():
    assert Manifest.decode(GOOD.encode(), "here") == GOOD
    assert GOOD.encode() == Manifest.decode(GOOD.encode(), "here").encode()
    assert GOOD.nbytes == 2 * 8192 + 4096


def test_a_checkpoint_outside_of_a_run_has_no_step():
    manifest = manifest_of(None)
    assert Manifest.decode(manifest.encode(), "here") == manifest


def test_every_flipped_byte_is_found_or_harmless():
    data = GOOD.encode()
    for position in range(len(data)):
        for bit in (1, 32):
            flipped = bytearray(data)
            flipped[position] ^= bit
            try:
                manifest = Manifest.decode(bytes(flipped), "here")
            except (CheckpointDamagedError, FormatVersionError) as error:
                assert "here" in str(error)  # noqa: PT017
            else:
                assert manifest == GOOD


def test_every_truncation_is_found():
    data = GOOD.encode()
    for length in range(len(data)):
        with pytest.raises(CheckpointDamagedError, match="here: not JSON"):
            Manifest.decode(data[:length], "here")


def test_a_newer_version_is_told_before_its_fields_are_looked_at():
    data = signed(format_version=FORMAT_VERSION + 1, archives="elsewhere")
    with pytest.raises(FormatVersionError, match=r"here: format version 2 is newer than version 1.*upgrade"):
        Manifest.decode(data, "here")


def test_a_flipped_bit_in_the_version_is_damage_and_no_newer_version():
    data = GOOD.encode()
    place = data.index(b'"format_version":1') + len(b'"format_version":')
    for bit in (0x02, 0x04, 0x08):  # 1 becomes 3, 5, 9
        flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        with pytest.raises(CheckpointDamagedError, match=r"SHA-256 differs, and it claims .* version [359]"):
            Manifest.decode(flipped, "here")


def test_unknown_fields_are_ignored():
    assert Manifest.decode(signed(colour="blue"), "here") == GOOD


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 0},
        {"format_version": "1"},
        {"format_version": True},
        {"step": -1},
        {"step": 1.0},
        {"step": 2**63},
        {"generation": 0},
        {"generation": ...},
        {"parent": [1]},
        {"parent": [0, 1]},
        {"parent": "1"},
        {"attempt": "../../x"},
        {"attempt": ""},
        {"attempt": "a/b-c"},
        {"world_size": 0},
        {"world_size": 3},
        {"world_size": 10**30},
        {"block_nbytes": 0},
        {"block_nbytes": 1000},
        {"block_nbytes": 1 << 40},
        {"archives": []},
        {"archives": {}},
        {"archives": [record(), record()]},
        {"archives": [record(), record(name="../../etc/passwd")]},
        {"archives": [record(), record(name="/etc/passwd")]},
        {"archives": [record(), record(name=".hidden")]},
        {"archives": [record(), record(name="a\0b")]},
        {"archives": [record(), record(name="y.zip\n")]},
        {"archives": [record(), record(name="y.zip", nbytes=-1)]},
        {"archives": [record(), record(name="y.zip", tail_position=12288)]},
        {"archives": [record(), record(name="y.zip", tail_position=100)]},
        {"archives": [record(), record(name="y.zip", tail_sha256="xyz")]},
        {"layout": record(name="rank-00000.zarr.zip")},
        {"layout": None},
        {"metadata": []},
        {"created": "yesterday"},
        {"writer": 1},
    ],
    ids=str,
)
def test_a_manifest_that_lies_is_damaged(changes):
    with pytest.raises(CheckpointDamagedError, match="here"):
        Manifest.decode(signed(**changes), "here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"a":1,"a":1}',
        b'{"a":NaN}',
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=range(8),
)
def test_what_is_no_json_object_is_damaged(data):
    with pytest.raises(CheckpointDamagedError, match="here"):
        Manifest.decode(data, "here")


@pytest.mark.parametrize(
    ("metadata", "place"),
    [
        ({"a": {"b": [1, {2}]}}, r"metadata\['a'\]\['b'\]\[1\] is set"),
        ({1: 2}, "key 1 is int"),
        ({"x": float("nan")}, "is float nan"),
        ({"x": 2**64}, "is int"),
        ({"x": b"1"}, "is bytes"),
    ],
)
def test_metadata_that_is_not_plain_json_is_refused(metadata, place):
    with pytest.raises(StateError, match=place):
        dataclasses.replace(GOOD, metadata=metadata).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(json.loads(GOOD.encode()))), JSON, min_size=1, max_size=3))
def test_hostile_fields_give_nothing_but_our_errors(changes):
    with contextlib.suppress(CheckpointError):
        Manifest.decode(signed(**changes), "here")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_nothing_but_our_errors(data):
    with pytest.raises(CheckpointError):
        Manifest.decode(data, "here")

from __future__ import annotations

import contextlib
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shardings import holding, shapes, shardings

from ckptengine.errors import CheckpointError, SaveFailedError
from ckptengine.layout.assign import assign
from ckptengine.layout.box import Box
from ckptengine.layout.holdings import Holding, decode, encode, holdings_of, same_holding
from ckptengine.state.leaf import ArrayLeaf, HostMemory, Part, Placement


def test_a_leaf_becomes_its_boxes() -> None:
    memory = HostMemory(0, (8, 4), 0, 0, None)
    parts = (Part(Box((0, 2), (3, 2)), memory), Part(Box((0, 6), (3, 1)), memory))
    leaf = ArrayLeaf(("model", 3, "w"), "bfloat16", (3, 8), Placement.SHARDED, parts, "torch")
    (held,) = holdings_of([leaf])
    assert (held.path, held.dtype, held.shape, held.placement, held.container) == (
        ("model", 3, "w"),
        "bfloat16",
        (3, 8),
        Placement.SHARDED,
        "torch",
    )
    assert held.offsets.tolist() == [[0, 2], [0, 6]]
    assert held.lengths.tolist() == [[3, 2], [3, 1]]


@st.composite
def tables(draw: st.DrawFn) -> list[Holding]:
    result = []
    for index in range(draw(st.integers(0, 4))):
        shape = draw(shapes)
        boxes = draw(shardings(shape))[0]
        path = ("lp\ud800.", draw(st.sampled_from([index, str(index)])), index)
        dtype = draw(st.sampled_from(["float32", "bool", "float8_e5m2"]))
        result.append(holding(path, shape, boxes, dtype, draw(st.sampled_from(list(Placement)))))
    return result


@given(tables())
def test_what_is_encoded_comes_back(table: list[Holding]) -> None:
    back = decode(encode(table))
    assert len(back) == len(table)
    assert all(map(same_holding, back, table))
    assert [[type(key) for key in held.path] for held in back] == [[type(key) for key in held.path] for held in table]


def test_ranks_with_the_same_leaves_send_the_same_leaf_table() -> None:
    messages = [
        encode([holding((f"layer.{i}", "w"), (64, 64), [Box((rank * 8, 0), (8, 64))]) for i in range(500)])
        for rank in (0, 1)
    ]
    table = decode(messages[0])
    assert table[499].offsets.tolist() == [[0, 0]]
    assert len(messages[0]) < 10_000
    assert len(zlib.compress(b"".join(messages))) < 1.2 * len(zlib.compress(messages[0]))


@given(tables(), st.data())
def test_damaged_messages_raise_only_errors_of_ours(table: list[Holding], data: st.DataObject) -> None:
    message = bytearray(encode(table))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(message) - 1)) if message else 0
        if data.draw(st.booleans()):
            message[place : place + 1] = data.draw(st.binary(max_size=3))
        else:
            del message[place:]
    with contextlib.suppress(CheckpointError):
        held = decode(bytes(message))
        assign([held])


@given(st.binary(max_size=64))
def test_noise_is_refused(message: bytes) -> None:
    with pytest.raises(SaveFailedError):
        decode(message)


def test_a_message_that_claims_more_than_it_has_is_refused() -> None:
    message = bytearray(encode([holding(("w",), (4,), [Box((0,), (4,))])]))
    message[8:16] = (1 << 50).to_bytes(8, "little")
    with pytest.raises(SaveFailedError, match="claims more bytes"):
        decode(bytes(message))


def test_counts_that_do_not_fit_are_refused() -> None:
    held = holding(("w",), (4,), [Box((0,), (4,))])
    wrong = Holding(
        held.path, held.dtype, held.shape, held.placement, "torch", held.offsets, np.zeros((2, 1), np.int64)
    )
    with pytest.raises(SaveFailedError, match="as many offsets as lengths"):
        decode(encode([wrong]))

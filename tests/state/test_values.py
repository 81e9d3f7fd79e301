from __future__ import annotations

import enum
import json
import math
import pathlib
import random
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import CheckpointDamagedError, StateError
from ckptengine.state.values import MAX_DEPTH, decode, digest, encode


def through_json(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, ("state", "x")))))


def bits(value: Any) -> Any:
    """Return a form in which equal means: same types, same order, same bits."""
    kind = type(value)
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is complex:
        return kind, struct.pack(">dd", value.real, value.imag)
    if kind in (list, tuple):
        return kind, [bits(item) for item in value]
    if isinstance(value, dict):
        return kind, [(bits(key), bits(item)) for key, item in value.items()]
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    return kind, value


KEYS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=8),
    st.tuples(st.integers(), st.text(max_size=3)),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(), max_size=8),
    st.text(st.sampled_from("$a\ud800\udfff"), max_size=4),
    st.binary(max_size=16),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(st.text(st.sampled_from("$abtuple"), max_size=6), inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_every_plain_value_comes_back_bit_for_bit(value: Any) -> None:
    again = through_json(value)
    assert bits(again) == bits(value)
    assert digest(encode(again, ())) == digest(encode(value, ()))


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0],
        math.inf,
        -math.inf,
        -0.0,
        5e-324,
        sys.float_info.max,
        2**53,
        -(2**53) + 1,
        10**5000,
        complex(math.nan, -0.0),
        "\ud800 alone",
        {"$tuple": [1]},
        {1: "int", "1": "str", (1,): "tuple", None: 0},
        {True: 1, 2: 3},
    ],
    ids=lambda value: type(value).__name__,
)
def test_awkward_values_come_back_bit_for_bit(value: Any) -> None:
    assert bits(through_json(value)) == bits(value)


@pytest.mark.parametrize(
    "value",
    [
        np.bool_(True),
        np.int8(-3),
        np.uint64(2**64 - 1),
        np.float16(0.1),
        np.float32(0.1),
        np.float64(0.1),
        np.complex64(1 - 2j),
        np.complex128(1 - 2j),
        ml_dtypes.bfloat16(1.5),
        ml_dtypes.float8_e4m3fn(1.5),
    ],
)
def test_numpy_scalars_keep_type_and_bits(value: Any) -> None:
    assert bits(through_json(value)) == bits(value)


@pytest.mark.parametrize("text", ["float32", ">f4", "<i8", "<U7", "S3", "<M8[us]", "?"])
def test_numpy_dtypes_come_back(text: str) -> None:
    assert through_json([np.dtype(text)]) == [np.dtype(text)]
    assert through_json(np.dtype(ml_dtypes.bfloat16)) == np.dtype(ml_dtypes.bfloat16)


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    pass


class Held(dict[str, int]):
    pass


class Sides(enum.Flag):
    LEFT = 1
    RIGHT = 2
    BOTH = 3


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Sides.LEFT | Sides.RIGHT,
        Sides(0),
        Point(1, float("nan")),
        defaultdict(list, {"a": [1], 2.5: [Colour.RED]}),
        defaultdict(None, {}),
        deque([1, (2, Point(0, 0))], maxlen=3),
        deque(),
        {1, 2.5, "a", (1, None)},
        frozenset({b"x"}),
        pathlib.Path("/a/b c"),
        pathlib.PureWindowsPath("C:\\x"),
        [{Colour.RED: pathlib.Path("x")}],
    ],
)
def test_containers_paths_and_enums_come_back_with_their_classes(value: Any) -> None:
    again = through_json(value)
    assert type(again) is type(value)
    assert repr(again) == repr(value) if not isinstance(value, set) else again == value
    assert getattr(again, "maxlen", None) == getattr(value, "maxlen", None)
    assert getattr(again, "default_factory", None) == getattr(value, "default_factory", None)
    assert digest(encode(again, ())) == digest(encode(value, ()))


def test_a_class_that_is_not_imported_is_not_looked_for() -> None:
    point = decode({"$namedtuple": ["gone.Point", ["x", "y"], [1, 2]]})
    assert (type(point).__name__, point.x, point.y) == ("Point", 1, 2)
    assert decode({"$enum": ["gone.Colour", ["RED"]]}) == "gone.Colour.RED"
    assert decode({"$enum": ["builtins.print", ["RED"]]}) == "builtins.print.RED"
    assert type(decode({"$namedtuple": ["os.stat_result", ["x"], [1]]})).__mro__[1] is tuple
    for data in (
        {"$namedtuple": ["a.B", ["x", "x"], [1, 2]]},
        {"$namedtuple": ["a.B", ["x; import os"], [1]]},
        {"$defaultdict": ["exec", []]},
        {"$deque": [2]},
        {"$path": ["PosixPath", "a"]},
        {"$set": [[1]]},
    ):
        with pytest.raises(CheckpointDamagedError):
            decode(data)
    with pytest.raises(CheckpointDamagedError, match="a newer ckptengine wrote it"):
        decode({"$unknown": 1})


def test_generators_point_to_the_random_state() -> None:
    for generator in (np.random.default_rng(1), random.Random(1)):
        with pytest.raises(StateError, match=r"x: .*can't be saved. Random streams go into ckptengine.RNG"):
            encode(generator, ("x",))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Text("a"), "Text"),
        (defaultdict(lambda: 0), "defaultdict"),
        (Held({"a": 1}), "Held"),
        (bytearray(b"x"), "bytearray"),
        (object(), "object"),
        (print, "builtin_function_or_method"),
        (np.float32, "type"),
        (np.datetime64("2020-01-01"), "datetime64"),
        (np.str_("x"), "str_"),
        (np.dtype([("a", "i4")]), "dtype"),
        (np.dtype(np.longdouble), "dtype"),
    ],
)
def test_what_would_lose_something_is_refused_by_path_and_type(value: Any, kind: str) -> None:
    with pytest.raises(StateError, match=r"state\.x\.1\.inner") as caught:
        encode([0, {"inner": value}], ("state", "x"))
    assert kind in str(caught.value)


def test_a_value_inside_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(StateError, match="deep"):
        encode(value, ("x",))


@pytest.mark.parametrize(
    "data",
    [
        {"$unknown": 1},
        {"$tuple": [1], "a": 2},
        {"$a": 1, "$b": 2},
        {"$int": "12"},
        {"$int": "0xg"},
        {"$int": 3},
        {"$float": "1.5"},
        {"$float": "3ff0000000000000"},
        {"$float": None},
        {"$complex": [1.0]},
        {"$complex": [1, 2]},
        {"$str": "!!"},
        {"$str": "gA=="},
        {"$bytes": [1]},
        {"$tuple": {"a": 1}},
        {"$dict": [[1]]},
        {"$dict": [[[1], 2]]},
        {"$dict": [[1, 2], [1, 3]]},
        {"$counter": 3},
        {"$numpy": ["float32", "00"]},
        {"$numpy": ["object", "00"]},
        {"$numpy": ["complex32", "00000000"]},
        {"$numpy": 1},
        {"$dtype": "O"},
        {"$dtype": "i4,i4"},
        {"$dtype": "(1000000,1000000)f8"},
        {"$torch.dtype": "__class__.__mro__"},
        {"$torch.size": [-1]},
        {"$torch.size": ["a"]},
        {"$torch.device": "no such device"},
        {"$os.dtype": {}},
        float("nan"),
        float("inf"),
        {1: 2},
        object(),
    ],
)
def test_json_that_nobody_wrote_is_called_damaged(data: Any) -> None:
    with pytest.raises(CheckpointDamagedError):
        decode(data)


def test_nesting_without_end_is_called_damaged() -> None:
    data: Any = 1
    for _ in range(MAX_DEPTH + 2):
        data = [data]
    with pytest.raises(CheckpointDamagedError, match="deep"):
        decode(data)
    for _ in range(MAX_DEPTH + 2):
        data = {"$dict": [[1, data]]}
    with pytest.raises(CheckpointDamagedError, match="deep"):
        decode(data)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["a", "$int", "$float", "$str", "$dict", "$tuple", "$numpy", "$dtype", "$bytes"]),
            inner,
            max_size=2,
        ),
    ),
    max_leaves=8,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_any_json_is_decoded_or_called_damaged(data: Any) -> None:
    try:
        value = decode(data)
    except CheckpointDamagedError:
        return
    assert bits(decode(encode(value, ()))) == bits(value)


def test_the_digest_tells_types_apart_but_not_the_order_of_keys() -> None:
    def of(value: Any) -> bytes:
        return digest(encode(value, ()))

    assert len(of(1)) == 8
    assert len({of(v) for v in (1, 1.0, True, "1", [1], (1,), b"1", np.int64(1), {"1": 1}, {1: 1})}) == 10
    assert of({"a": 1, "b": 2}) == of({"b": 2, "a": 1})
    assert of({1: 1, 2: 2}) == of({2: 2, 1: 1})
    assert of(OrderedDict(a=1, b=2)) != of(OrderedDict(b=2, a=1))
    assert of(0.0) != of(-0.0)

"""Any state of arrays and plain values comes back as it was."""

import math
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from in_memory import IN_MEMORY

import ckptengine as ce

DTYPES = [
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
]
DTYPES += [
    np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
]


@st.composite
def arrays(draw):
    """An array of random bits, maybe a view that is not contiguous: transposed, every other, backwards, repeated."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7))
    step = draw(st.sampled_from([1, 2, -1, -3]))
    whole = (*shape[:-1], shape[-1] * abs(step)) if shape else ()
    count = math.prod(whole)
    raw = draw(st.binary(min_size=16, max_size=16))
    data = np.frombuffer((raw * (count * dtype.itemsize // 16 + 1))[: count * dtype.itemsize], np.uint8)
    if dtype == np.bool_:
        data = data & 1
    array = data.copy().view(dtype).reshape(whole)
    if shape:
        array = array[..., ::step]
    if draw(st.booleans()):
        array = array.transpose(draw(st.permutations(range(len(shape)))))
    return array


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=6,
)
keys = st.text(max_size=6) | st.integers(-(2**40), 2**40)
trees = st.recursive(
    arrays() | plain,
    lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=3) | st.tuples(inner, arrays()),
    max_leaves=8,
)
states = st.dictionaries(st.text(max_size=8), trees, max_size=5)


def check_equal(got, want, where="state"):
    assert type(got) is type(want) or (isinstance(got, np.ndarray) and isinstance(want, np.ndarray)), where
    if isinstance(want, np.ndarray):
        assert got.shape == want.shape, where
        assert got.dtype == want.dtype, where
        assert got.tobytes() == want.tobytes(), where
    elif isinstance(want, dict):
        assert list(map(repr, sorted(got, key=repr))) == list(map(repr, sorted(want, key=repr))), where
        for key in want:
            check_equal(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), where
        for number, item in enumerate(want):
            check_equal(got[number], item, f"{where}.{number}")
    else:
        assert repr(got) == repr(want), where


def blank(value):
    """Return the same structure with other contents, arrays with the same strides."""
    if isinstance(value, np.ndarray):
        other = np.empty_like(value)
        other.reshape(-1)[...] = 1
        return other
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(blank(item) for item in value)
    return value


relaxed = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@relaxed
@given(states)
def test_any_state_comes_back(state):
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        ce.save(folder, state)
        check_equal(ce.load(folder), state)
        target = blank(state)
        assert ce.load(folder, into=target).complete
        check_equal(target, state)


@relaxed
@given(array=arrays(), other=arrays())
def test_arrays_are_filled_in_place(array, other):
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        ce.save(folder, {"array": array, "list": [other, 3]})
        # A target of other strides, within a larger array whose other elements must stay.
        frame = np.ones([2 * length + 1 for length in array.shape], array.dtype)
        inner = frame[tuple(slice(1, None, 2) for _ in array.shape)] if array.ndim else frame
        target = {"array": inner, "list": [np.ones(other.shape, other.dtype), 0]}
        second = target["list"][0]
        ce.load(folder, into=target)
        assert target["array"] is inner
        assert target["list"][0] is second
        check_equal(inner, array)
        check_equal(target["list"], [other, 3])
        expected = np.ones_like(frame)
        expected[tuple(slice(1, None, 2) for _ in array.shape) if array.ndim else ...] = array
        assert frame.tobytes() == expected.tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 2**200, "\ud800", b"\0", 1 + 2j, None])
def test_plain_values_keep_type_and_bits(value, tmp_path):
    ce.save(tmp_path, {"value": value, "inside": [value, (value,), {"k": value}]})
    loaded = ce.load(tmp_path)
    check_equal(loaded, {"value": value, "inside": [value, (value,), {"k": value}]})


def test_an_empty_state_is_a_checkpoint(tmp_path):
    ce.save(tmp_path, {})
    assert ce.load(tmp_path) == {}
    assert ce.load(tmp_path, into={}).complete


def test_many_leaves_come_back(tmp_path):
    state = {f"leaf-{number}": np.full(number % 5, number) for number in range(3000)}
    ce.save(Path(tmp_path), state)
    check_equal(ce.load(tmp_path), state)

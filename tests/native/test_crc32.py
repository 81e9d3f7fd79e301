import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_tables import aligned, examples, native, random_bytes

VARIANTS = native.variants()


def test_the_portable_variant_is_always_there_and_last():
    assert VARIANTS[-1] == "portable"
    assert len(set(VARIANTS)) == len(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_standard_check_value_comes_out(variant):
    assert native.crc32(b"123456789", variant=variant) == 0xCBF43926


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_short_length_at_every_alignment_equals_zlib(variant):
    memory = aligned(1200)
    memory[:] = random_bytes(1, 1200)
    for length in range(0, 700, 3):
        for offset in (0, 1, 7, 15, 16, 31, 33, 63):
            data = memory[offset : offset + length]
            assert native.crc32(data, variant=variant) == zlib.crc32(data), (length, offset)


@pytest.mark.parametrize("variant", VARIANTS)
@given(data=st.binary(max_size=5000), value=st.integers(0, 2**32 - 1), cut=st.integers(0, 5000))
@examples
def test_any_bytes_and_any_initial_value_equal_zlib(variant, data, value, cut):
    assert native.crc32(data, value, variant) == zlib.crc32(data, value)
    rest = memoryview(data)[cut:]
    assert native.crc32(rest, value, variant) == zlib.crc32(rest, value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_large_buffer_equals_zlib(variant):
    data = random_bytes(2, 3_000_017)
    assert native.crc32(data, 7, variant) == zlib.crc32(data, 7)
    assert native.crc32(bytes(1 << 20), variant=variant) == zlib.crc32(bytes(1 << 20))


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
@examples
def test_combining_gives_the_crc_of_the_concatenation(first, second):
    combined = native.crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**61), st.integers(0, 2**61))
@examples
def test_combining_over_huge_lengths_is_associative(crc, one, two):
    # bytes of zeros have their own CRC; appending them in one step or in two is the same
    def zeros(nbytes: int) -> int:
        return native.crc32_combine(0, 0xFFFFFFFF, 0) ^ native.crc32_combine(0xFFFFFFFF, 0, nbytes)

    at_once = native.crc32_combine(crc, zeros(one + two), one + two)
    assert native.crc32_combine(native.crc32_combine(crc, zeros(one), one), zeros(two), two) == at_once


def test_an_unknown_variant_is_refused_and_the_usable_ones_are_named():
    with pytest.raises(ValueError, match="portable"):
        native.crc32(b"", variant="sse9")


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_value_that_is_no_crc_is_refused(value):
    with pytest.raises(ValueError, match="value"):
        native.crc32(b"", value)
    with pytest.raises(ValueError, match="first"):
        native.crc32_combine(value, 0, 0)
    with pytest.raises(ValueError, match="second"):
        native.crc32_combine(0, value, 0)


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match="second_nbytes"):
        native.crc32_combine(0, 0, -1)


def test_data_with_gaps_is_refused():
    with pytest.raises((ValueError, BufferError)):
        native.crc32(np.zeros(10, np.uint8)[::2])

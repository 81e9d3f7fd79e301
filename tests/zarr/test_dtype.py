import ml_dtypes
import numpy as np
import pytest
import zarr
from zarr.dtype import parse_dtype
from zarr.storage import MemoryStore

from ckptengine.zarr import BFloat16

NATIVE = np.dtype(ml_dtypes.bfloat16)


def test_zarr_finds_it_by_its_name_and_by_its_numpy_type() -> None:
    assert parse_dtype("bfloat16", zarr_format=3) == BFloat16()
    assert parse_dtype(NATIVE, zarr_format=3) == BFloat16()
    assert BFloat16().to_native_dtype() == NATIVE
    assert parse_dtype("float16", zarr_format=3) != BFloat16()


@pytest.mark.filterwarnings("ignore:invalid value")  # zarr compares with the fill value, and there are NaNs
def test_an_array_that_zarr_itself_writes_reads_back_bit_for_bit() -> None:
    values = np.arange(1 << 16, dtype="u2").view(NATIVE).reshape(256, 256)
    store = MemoryStore()
    zarr.create_array(store, data=values, chunks=(100, 100))
    array = zarr.open_array(store, mode="r")
    assert array.dtype == NATIVE
    assert np.asarray(array[...]).tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("text", "bits"),
    [("NaN", 0x7FC0), ("Infinity", 0x7F80), ("-Infinity", 0xFF80), (1.5, 0x3FC0), (0, 0), ("0x3f81", 0x3F81)],
)
def test_fill_values_are_read(text: object, bits: int) -> None:
    value = BFloat16().from_json_scalar(text, zarr_format=3)
    assert value.dtype == NATIVE
    assert value.view(np.uint16) == bits


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.5, 0])
def test_fill_values_survive_the_way_through_json(value: float) -> None:
    text = BFloat16().to_json_scalar(NATIVE.type(value), zarr_format=3)
    assert np.array_equal(BFloat16().from_json_scalar(text, zarr_format=3), NATIVE.type(value), equal_nan=True)


def test_zarr_v2_has_no_such_type() -> None:
    with pytest.raises(ValueError, match="zarr_format=3"):
        zarr.create_array(MemoryStore(), shape=(2,), dtype=BFloat16(), zarr_format=2)

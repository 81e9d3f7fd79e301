"""The element types of version 1: logical name, storage in numpy, name and fill value in Zarr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "DType", "name_of_numpy_dtype"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    `name` is the logical name (numpy's and torch's common one); `numpy` is what `ckptengine.load` returns;
    `zarr` the Zarr v3 `data_type`; `fill` its JSON `fill_value`. Where `zarr` is not the logical type
    (`encoded`), the raw bits are stored under an unsigned integer type and the attributes carry `name`.
    """

    name: str
    numpy: np.dtype[Any]
    zarr: str
    fill: Any

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.numpy.itemsize

    @property
    def encoded(self) -> bool:
        """Whether the stored Zarr type is a stand-in of the same size."""
        return self.zarr != self.name


def _table() -> dict[str, DType]:
    nan = "NaN"
    rows: list[tuple[str, Any, str, Any]] = [("bool", np.bool_, "bool", False)]
    rows += [
        (f"{sign}int{bits}", f"{sign}int{bits}", f"{sign}int{bits}", 0)
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    ]
    rows += [(f"float{bits}", f"float{bits}", f"float{bits}", nan) for bits in (16, 32, 64)]
    rows += [(f"complex{bits}", f"complex{bits}", f"complex{bits}", [nan, nan]) for bits in (64, 128)]
    rows += [("bfloat16", ml_dtypes.bfloat16, "bfloat16", nan)]
    rows += [
        (name, getattr(ml_dtypes, name), "uint8", 0)
        for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
    ]
    # Types that numpy has no arithmetic for: the raw bits, as unsigned integers of the same size.
    rows += [("complex32", np.uint32, "uint32", 0), ("float4_e2m1fn_x2", np.uint8, "uint8", 0)]
    return {name: DType(name, np.dtype(kind), zarr, fill) for name, kind, zarr, fill in rows}


DTYPES: dict[str, DType] = _table()

_BY_NUMPY = {dtype.numpy: dtype.name for dtype in reversed(DTYPES.values())}


def name_of_numpy_dtype(dtype: np.dtype[Any]) -> str | None:
    """Return the logical name of a numpy or ml_dtypes dtype in either byte order, or None."""
    return _BY_NUMPY.get(dtype.newbyteorder("=") if dtype.kind in "iufc" else dtype)

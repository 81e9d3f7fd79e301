"""bfloat16 for zarr-python, as `ml_dtypes.bfloat16`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from zarr.core.dtype.npy.float import BaseFloat
from zarr.dtype import data_type_registry

__all__ = ["BFloat16"]

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """The Zarr v3 extension type `bfloat16`: 16 bits, the upper half of a float32.

    Source: the registry of Zarr extensions (zarr-extensions, data-types/bfloat16).
    """

    dtype_cls = type(_NATIVE)
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    def to_native_dtype(self) -> Any:
        """Return the numpy dtype; ml_dtypes knows no byte order, so it is the machine's, little-endian."""
        return _NATIVE

    def to_json(self, zarr_format: Any) -> Any:
        """Return the name of the type; raises `ValueError` for Zarr v2, which has none."""
        if zarr_format != 3:
            raise ValueError("bfloat16 has no name in Zarr v2: use zarr_format=3")
        return self._zarr_v3_name

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """Return a fill value: a number, `NaN`, `Infinity`, `-Infinity`, or the bits as `0x` and 4 digits."""
        if isinstance(data, str) and data.startswith("0x"):
            return np.array(int(data, 16), np.uint16).view(_NATIVE)[()]
        return super().from_json_scalar(data, zarr_format=zarr_format)

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return 2


# zarr-python 3.1 collects the entry points of the group zarr.data_type, but never loads them.
data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)

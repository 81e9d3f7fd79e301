"""bfloat16 for zarr-python, as `ml_dtypes.bfloat16`; registered by the entry point `zarr.data_type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from zarr.core.dtype.npy.float import BaseFloat

__all__ = ["BFloat16"]


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """The Zarr v3 extension type `bfloat16`: 16 bits, the upper half of a float32.

    Source: the registry of Zarr extensions (zarr-extensions, data-types/bfloat16).
    """

    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> BFloat16:
        """Return this type for numpy's view of it; raises `DataTypeValidationError` for another dtype."""
        if dtype == np.dtype(ml_dtypes.bfloat16):
            return cls()
        return super().from_native_dtype(dtype)

    def to_native_dtype(self) -> Any:
        """Return the numpy dtype; ml_dtypes knows no byte order, so it is the machine's, little-endian."""
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return 2

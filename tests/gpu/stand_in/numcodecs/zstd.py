"""The Zstandard codec of numcodecs, over the system's libzstd by ctypes."""

import ctypes
import ctypes.util

import numpy as np

_library = ctypes.CDLL(ctypes.util.find_library("zstd") or "libzstd.so.1")
for _name in ("ZSTD_compressBound", "ZSTD_compress", "ZSTD_decompress"):
    getattr(_library, _name).restype = ctypes.c_size_t
_library.ZSTD_getFrameContentSize.restype = ctypes.c_ulonglong
_UNKNOWN = 2**64 - 2  # ZSTD_CONTENTSIZE_UNKNOWN; ZSTD_CONTENTSIZE_ERROR is one more


class Zstd:
    """Encodes and decodes whole frames, as `numcodecs.zstd.Zstd` does."""

    def __init__(self, level=0, checksum=False):
        if checksum:
            raise ValueError("this stand-in writes no checksums")
        self._level = level

    def encode(self, buffer):
        data = np.frombuffer(buffer, np.uint8)
        bound = _library.ZSTD_compressBound(ctypes.c_size_t(data.size))
        out = np.empty(bound, np.uint8)
        address = ctypes.c_void_p(out.ctypes.data)
        source = ctypes.c_void_p(data.ctypes.data)
        level = ctypes.c_int(self._level)
        nbytes = _library.ZSTD_compress(address, ctypes.c_size_t(bound), source, ctypes.c_size_t(data.size), level)
        return out[: _checked(nbytes)].tobytes()

    def decode(self, buffer, out=None):
        data = np.frombuffer(buffer, np.uint8)
        source = ctypes.c_void_p(data.ctypes.data)
        expected = _library.ZSTD_getFrameContentSize(source, ctypes.c_size_t(data.size))
        if expected >= _UNKNOWN:
            raise RuntimeError("not a Zstandard frame of known size")
        target = np.empty(expected, np.uint8) if out is None else np.asarray(out).view(np.uint8).reshape(-1)
        address = ctypes.c_void_p(target.ctypes.data)
        nbytes = _library.ZSTD_decompress(address, ctypes.c_size_t(target.size), source, ctypes.c_size_t(data.size))
        if _checked(nbytes) != target.size:
            raise RuntimeError(f"the frame has {nbytes} bytes, {target.size} were expected")
        return target.tobytes() if out is None else out


def _checked(result):
    if _library.ZSTD_isError(ctypes.c_size_t(result)):
        raise RuntimeError("Zstandard error")
    return result

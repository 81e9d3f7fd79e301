"""The C copy path. Tables are C-contiguous int64 arrays; all work is done without the GIL."""

from collections.abc import Buffer

BLOCK_ALIGNMENT: int

def variants() -> tuple[str, ...]: ...
def crc32(data: Buffer, value: int = 0, variant: str | None = None) -> int: ...
def crc32_combine(first: int, second: int, second_nbytes: int) -> int: ...
def pack(
    image_address: int,
    image_nbytes: int,
    ops: Buffer,
    index: Buffer,
    block_nbytes: int,
    crcs: Buffer,
    threads: int,
    variant: str | None = None,
) -> None: ...
def seal(
    image_address: int,
    fixed_nbytes: int,
    extents: Buffer,
    block_nbytes: int,
    piece_crcs: Buffer,
    entry_crcs: Buffer,
    block_crcs: Buffer,
    threads: int,
) -> None: ...
def scatter(
    address: int,
    position: int,
    nbytes: int,
    fixed_nbytes: int,
    block_nbytes: int,
    block_crcs: Buffer,
    ops: Buffer,
    index: Buffer,
    threads: int,
) -> int: ...
def load(
    fd: int,
    fixed_nbytes: int,
    block_nbytes: int,
    block_crcs: Buffer,
    ranges: Buffer,
    ops: Buffer,
    index: Buffer,
    request_nbytes: int,
    threads: int,
) -> int: ...
def write(fd: int, address: int, nbytes: int, position: int, request_nbytes: int, depth: int) -> None: ...

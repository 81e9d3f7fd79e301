"""The C copy path: tensors to file bytes and back, checksummed, on several threads and without the GIL.

Tables are C-contiguous buffers of 8-byte integers (`int64`) or 4-byte ones (CRCs, `uint32`); they and the memory
that they name must stay as they are until the call returns. Every bound is checked before any memory is touched: a
violation is a `ValueError` that names the op and what is out of bounds. A CRC32 is zlib's. `threads` is 1 to 256,
the calling thread being one of them; fewer are used where there is less work or the system refuses more.

`block_nbytes` is any positive number (files opened with `O_DIRECT` want a multiple of `BLOCK_ALIGNMENT`). A *piece*
is what lies between two multiples of it in the file, cut to one op: byte ranges need not be aligned to it.
"""

from collections.abc import Buffer

BLOCK_ALIGNMENT: int
"""What `O_DIRECT` wants offsets, lengths and addresses to be a multiple of."""
READY: int
"""What was waited for is there."""
STOPPED: int
"""The window was stopped, by any rank: nothing more comes through it."""
LATE: int
"""What was waited for was not there in the time given; the same call may be made again."""

def variants() -> tuple[str, ...]:
    """Return the names of the CRC32 variants that this CPU can run, best first.

    They are "vpclmul512" (AVX-512), "vpclmul" (AVX2) and "pclmul" on x86-64, "pmull" and "armcrc" on aarch64, and
    "portable" everywhere. Each has been run against "portable" when the module was loaded.
    """

def counters() -> tuple[int, int, int, int, int]:
    """Return what this process has done: bytes copied, bytes written, writes, bytes read, reads."""

def memory_map(nbytes: int, threads: int, fd: int = -1) -> int:
    """Return the address of new, zeroed memory: a multiple of 2 MiB, as `nbytes` is.

    With `fd` it is a file's, which is at least as long. It lies in huge pages where the system has them, every page of
    it is there when the call returns, and a forked process does not have it. Raises `OSError` (ENOMEM) where it can't
    be had.
    """

def memory_unmap(address: int, nbytes: int) -> None:
    """Give back memory that `memory_map` gave to this very process, which nobody may use any more."""

def crc32(data: Buffer, value: int = 0, variant: str | None = None) -> int:
    """Return the CRC32 of `data`, which is C-contiguous, continued from `value`, with the best or the named variant.

    Raises `ValueError` for a variant that this CPU lacks, naming those it has.
    """

def crc32_combine(first: int, second: int, second_nbytes: int) -> int:
    """Return the CRC32 of two byte strings one after the other, from theirs and the length of the second.

    The method is that of zlib's `crc32_combine`: powers of x modulo the polynomial, by squaring.
    """

def pack(
    image_address: int,
    image_nbytes: int,
    ops: Buffer,
    index: Buffer,
    block_nbytes: int,
    crcs: Buffer,
    threads: int,
    variant: str | None = None,
    begin: int = 0,
    end: int = -1,
) -> None:
    """Copy strided tensors into the image of a file and checksum its pieces, in one pass over the memory.

    `ops` (int64, flat) holds one op after the other, `index` (int64, one more than there are ops) where each begins:
    `file_pos, nbytes, crc_index, itemsize, ndim, src_address, src_low, src_nbytes, dense_shape[ndim],
    box_shape[ndim], strides[ndim]`. At image byte `file_pos` lies a dense C-order array of `dense_shape`, `nbytes`
    in all. Its leading corner `box_shape` is filled from `src_address` with `strides` in bytes (of any sign, or 0;
    itemsize 1, 2, 4, 8 or 16), all of it within `[src_low, src_low + src_nbytes)`; the rest becomes zero. The CRC32
    of the op's piece k goes to `crcs[crc_index + k]` (uint32).

    A `src_address` of 0 copies nothing: the bytes are in the image already. An `image_address` of 0 writes nothing,
    and checksums what would have been written to an image of `image_nbytes`. Ops must not overlap in the image.

    Only the window `[begin, end)` of the image is filled, and only its pieces get CRCs; `image_address` is where byte
    `begin` lies. It is cut at multiples of `block_nbytes`, or at the image's end (-1).
    """

def seal(
    image_address: int,
    fixed_nbytes: int,
    extents: Buffer,
    block_nbytes: int,
    piece_crcs: Buffer,
    entry_crcs: Buffer,
    block_crcs: Buffer,
    threads: int,
    begin: int = 0,
    end: int = -1,
) -> None:
    """Turn the CRCs of pieces into those of whole entries and of whole blocks.

    `extents` (int64, rows of 4, sorted, disjoint): `file_pos, nbytes, crc_index, descriptor_pos`. `entry_crcs[i]`
    (uint32) becomes the CRC32 of extent i, combined from its pieces in `piece_crcs`; unless `descriptor_pos` is
    negative, it is also written to the 4 image bytes there, little-endian, which must lie outside of all extents.
    Then `block_crcs[b]` (uint32) becomes that of block b of `[0, fixed_nbytes)`: the piece's where the block lies
    within one extent, else computed from the image.

    Only what lies in the window `[begin, end)`, as `pack` has it, is written: blocks, and entries whose descriptor
    (or, without one, whose end) lies in it. `image_address` is where byte `begin` lies.
    """

def scatter(
    address: int,
    position: int,
    nbytes: int,
    fixed_nbytes: int,
    block_nbytes: int,
    block_crcs: Buffer | None,
    ops: Buffer,
    index: Buffer,
    threads: int,
) -> int:
    """Verify file bytes that lie in memory, and scatter them into strided tensors.

    At `address` lie the file's bytes `[position, position + nbytes)`, cut at multiples of `block_nbytes` or at
    `fixed_nbytes`. `block_crcs` (uint32) is the table of the whole file, None where it has none, as a file of another
    format: then nothing is compared. `ops` and `index` are as for `pack`, sorted
    by `file_pos`, each op being `file_pos, nbytes, itemsize, ndim, dst_address, dst_low, dst_nbytes,
    dense_shape[ndim], box_offset[ndim], box_shape[ndim], strides[ndim]`: the box (`box_offset`, `box_shape`) of the
    dense array at `file_pos` goes to `dst_address`, as far as its bytes lie in the range; an element that the range
    cuts is copied in part. Several ops may read the same bytes. Strides of a destination are any but those that are
    shorter than an item where the box has more than one.

    Returns -1, or the number of the first damaged block: of that block nothing has been scattered, of others some.
    """

def load(
    fd: int,
    fixed_nbytes: int,
    block_nbytes: int,
    block_crcs: Buffer | None,
    ranges: Buffer,
    ops: Buffer,
    index: Buffer,
    request_nbytes: int,
    threads: int,
) -> int:
    """Read ranges of a file, verify and scatter them, with `threads` requests in flight.

    `ranges` (int64, rows of `position, nbytes`, sorted, disjoint) are cut like those of `scatter`, and read in
    requests of `request_nbytes`, a multiple of `block_nbytes`, into buffers that suit `O_DIRECT` and are kept for
    the next call. The other tables are those of `scatter`.

    Returns -1, or the lowest damaged block that was found; a file that ends too early is damaged where it ends.
    Raises `OSError` with `errno` and the position where a read fails.
    """

def window_control(slots: int, ranks: int) -> int:
    """Return the bytes of a window's control words; its slots follow."""

def share_wait(window: Buffer, request: int, consumers: Buffer, seconds: float) -> int:
    """Wait until a request may be put into its slot, number `request % slots`; return READY, STOPPED or LATE.

    `window` (int64) is `address, nbytes, slots, slot_nbytes, ranks, rank`: page-aligned memory, zero before its first
    use, that all `ranks` of a node have mapped, and which of them this is. It holds `window_control(slots, ranks)`
    bytes of control words and then the slots. `consumers` (int64) are the ranks that want request `request - slots`,
    which had the slot before; the slot is free when they are done with it.
    """

def share_publish(window: Buffer, request: int) -> None:
    """Hand a request, whose verified bytes lie in its slot, to its consumers."""

def share_stop(window: Buffer) -> None:
    """Stop a window for good: all present and future waits of all ranks return STOPPED, at once."""

def share_consume(
    window: Buffer,
    requests: Buffer,
    fixed_nbytes: int,
    block_nbytes: int,
    block_crcs: Buffer | None,
    ops: Buffer,
    index: Buffer,
    threads: int,
    seconds: float,
) -> int:
    """Scatter requests of one file from the window, each as soon as it is published; return READY, STOPPED or LATE.

    `requests` (int64, rows of `number, position, nbytes`, by number) are cut like the ranges of `load` and fit into a
    slot; the other tables are those of `load`. Nothing is verified again. The calling rank must be one of the
    consumers of each. Each wait may take `seconds`; after LATE the same call goes on where it was.
    """

def write(fd: int, address: int, nbytes: int, position: int, request_nbytes: int, depth: int) -> None:
    """Write `nbytes` of memory at `address` to a file at `position`, `depth` requests (1 to 256) in flight.

    With `O_DIRECT`, `address`, `nbytes`, `position` and `request_nbytes` must be multiples of `BLOCK_ALIGNMENT`.
    Raises `OSError` with `errno` and the position where a write fails; short writes are continued.
    """

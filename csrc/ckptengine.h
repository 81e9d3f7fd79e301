/* The C copy path: everything but module*.c and arguments.c is free of Python.
 *
 * Conventions. Tables come from Python as int64 or uint32 arrays. Each job has a prepare step, which checks
 * every bound and makes every allocation, and a run step, which touches memory and can't fail on bounds.
 * A CRC "state" is the inverted register of zlib's CRC32: crc == ~state, and the first state is ~0.
 */
#ifndef CKPTENGINE_H
#define CKPTENGINE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* before any system header: O_DIRECT, MADV_HUGEPAGE, pread */
#endif

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ckptengine stores little-endian bytes and copies them as they are: a little-endian machine is needed"
#endif

#define CK_ALIGNMENT 4096
#define CK_MAX_NDIM 64
#define CK_MAX_THREADS 256
#define CK_HUGE_PAGE (2 << 20)

/* ---- errors: filled in by the core, raised by module.c ---- */

typedef enum { CK_OK = 0, CK_VALUE, CK_MEMORY, CK_SYSTEM } ck_kind;

typedef struct {
    ck_kind kind;
    int number; /* errno, for CK_SYSTEM */
    char text[320];
} ck_error;

/* Both return false, so that a check can end with `return ck_value_error(...)`. */
bool ck_value_error(ck_error *error, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool ck_memory_error(ck_error *error);

/* ---- counters (counters.c) ---- */

typedef enum {
    CK_COPIED, /* bytes brought from tensors into images, or from files' bytes into tensors */
    CK_WRITTEN,
    CK_WRITE_CALLS,
    CK_READ,
    CK_READ_CALLS,
    CK_COUNTERS
} ck_counter;

void ck_count(ck_counter counter, int64_t n);
int64_t ck_counted(ck_counter counter);

/* ---- CRC32 (crc32*.c) ---- */

typedef uint32_t (*ck_update)(uint32_t state, const unsigned char *data, size_t nbytes);
/* Copies and checksums in one pass. Stores may be non-temporal: ck_fence() must follow. */
typedef uint32_t (*ck_copy)(uint32_t state, unsigned char *target, const unsigned char *source,
                            size_t nbytes);

typedef struct {
    const char *name;
    bool (*usable)(void);
    ck_update update;
    ck_copy copy;
} ck_variant;

void ck_init(void);                                   /* once, before anything else */
int ck_variants(const ck_variant *const **list);      /* the usable ones, best first */
const ck_variant *ck_variant_named(const char *name); /* NULL: the best; unknown: NULL */

uint32_t ck_crc32_portable(uint32_t state, const unsigned char *data, size_t nbytes);
uint32_t ck_crc32_copy_portable(uint32_t state, unsigned char *target, const unsigned char *source,
                                size_t nbytes);
uint32_t ck_power(uint64_t exponent);         /* x^exponent mod P, reflected */
uint32_t ck_multiply(uint32_t a, uint32_t b); /* a * b mod P, reflected */
uint32_t ck_shift(uint64_t nbytes);           /* the factor that moves a CRC over nbytes more bytes */
void ck_fold_constants(uint64_t nbits, uint64_t pair[2]); /* for carry-less folding over nbits */

/* Moves `first` over the bytes that gave `second`; `shift` is ck_shift of their number. */
static inline uint32_t ck_combine(uint32_t first, uint32_t second, uint32_t shift) {
    return ck_multiply(shift, first) ^ second;
}

extern const ck_variant *const ck_x86_variants[];
extern const ck_variant *const ck_arm_variants[];
void ck_x86_init(void);
void ck_arm_init(void);

/* ---- copies that go past the cache (stream.c) ---- */

/* memcpy with non-temporal stores, for runs of a few hundred bytes and more: ck_fence() must follow. */
void ck_stream(unsigned char *target, const unsigned char *source, size_t nbytes);
void ck_fence(void);

/* ---- threads (threads.c) ---- */

/* Returns false to make all threads stop pulling units; units already pulled are finished. */
typedef bool (*ck_body)(void *context, int64_t unit, int worker);

/* Runs body(context, 0 ... units-1) on up to `threads` threads, the caller being one of them. Units are
 * pulled in ascending order. Runs on fewer threads where the system refuses more. */
void ck_parallel(int64_t units, int threads, ck_body body, void *context);

/* ---- memory (memory.c) ---- */

/* nbytes is a multiple of CK_HUGE_PAGE; every page is there when it returns. They are new and zeroed, or,
 * with an fd that is not -1, those of a file that is at least as long, which other processes see. */
bool ck_memory_map(int64_t nbytes, int fd, int threads, unsigned char **address, ck_error *error);
void ck_memory_unmap(unsigned char *address, int64_t nbytes);

/* ---- strided views (view.c) ---- */

/* A box of a dense C-order array, and the strided memory that the box's elements come from or go to. */
typedef struct {
    int64_t itemsize;
    int ndim;
    bool contiguous;     /* after ck_view_simplify: elements are bytes and the innermost stride is 1 */
    unsigned char *base; /* the box's first element */
    int64_t dense[CK_MAX_NDIM];
    int64_t offset[CK_MAX_NDIM];
    int64_t box[CK_MAX_NDIM];
    int64_t stride[CK_MAX_NDIM]; /* bytes */
} ck_view;

/* The columns of a view in an op; offset may be NULL for all zeros. */
typedef struct {
    int64_t op;
    int64_t itemsize, ndim, nbytes;
    int64_t address, low, size;
    const int64_t *dense, *offset, *box, *stride;
} ck_view_row;

/* The values of op `number` in a table of `length` of them: `head` values, the number of dimensions at
 * `ndim_at` among them, then `per_dim` for each dimension. NULL, with the error, where the index does not
 * lead to one op. */
const int64_t *ck_op_at(const int64_t *ops, int64_t length, const int64_t *index, int64_t number, int head,
                        int ndim_at, int per_dim, ck_error *error);
bool ck_view_check(const ck_view_row *row, bool writes, ck_error *error);
void ck_view_set(ck_view *view, const ck_view_row *row); /* only after ck_view_check; simplifies */
static inline bool ck_view_transposed(const ck_view *view) {
    return !view->contiguous && view->ndim >= 2 &&
           llabs(view->stride[view->ndim - 2]) < llabs(view->stride[view->ndim - 1]);
}

/* A part of the box that lies in one byte range of the dense array: `rows` runs of `nbytes` bytes each in the
 * dense array, `pitch` apart, and the strided memory of the first. */
typedef struct {
    int64_t position; /* of the first row, in bytes from the start of the dense array */
    int64_t nbytes;   /* of one row, in the dense array */
    int64_t pitch;    /* from row to row in the dense array */
    int64_t rows;
    unsigned char *memory; /* of the first element; a partial element starts inside of it */
    bool partial;          /* the part is a piece of one element: copy bytes */
} ck_part;

typedef struct {
    const ck_view *view;
    int64_t begin, end;  /* bytes of the dense array */
    int64_t first, last; /* whole elements still to visit */
    int stage;           /* partial head, whole elements, partial tail, done */
    bool placed;         /* coordinates below are valid */
    int64_t row_start;   /* dense element index of the current row */
    uint64_t row;        /* address of the box's first element in the current row */
    int64_t column;      /* next dense coordinate in the innermost dimension */
    int64_t at[CK_MAX_NDIM];
    int64_t pitch[CK_MAX_NDIM];
} ck_walk;

/* Visits the box's parts within bytes [begin, end) of the dense array, in ascending order. */
void ck_walk_start(ck_walk *walk, const ck_view *view, int64_t begin, int64_t end);
bool ck_walk_next(ck_walk *walk, ck_part *part);

/* ---- copies of views (gather.c) ---- */

/* Fills linear (the dense bytes [begin, end)) from memory, zero outside of the box. */
void ck_gather(const ck_view *view, int64_t begin, int64_t end, unsigned char *linear);
/* Writes the box's part of linear (the dense bytes [begin, end)) to memory. */
void ck_scatter_view(const ck_view *view, int64_t begin, int64_t end, const unsigned char *linear);

/* ---- pack (pack.c) ---- */

/* Pieces are cut at multiples of `block` in the file. */
static inline int64_t ck_pieces(int64_t position, int64_t nbytes, int64_t block) {
    return nbytes == 0 ? 0 : (position + nbytes - 1) / block - position / block + 1;
}

typedef struct {
    int64_t op, piece;
} ck_unit;

typedef struct {
    unsigned char *image; /* of byte `begin` */
    int64_t image_nbytes;
    int64_t begin, end; /* the window: what of the image is filled */
    const int64_t *ops, *index;
    int64_t ops_length, n_ops;
    int64_t block;
    uint32_t *crcs;
    int64_t n_crcs;
    int threads;
    const ck_variant *variant;
    /* set by prepare */
    ck_unit *units;
    int64_t n_units;
    unsigned char *scratch; /* scratch_nbytes for each thread */
    int64_t scratch_nbytes;
} ck_pack;

/* A window is cut at multiples of `block`, or at the end of the bytes. */
static inline bool ck_cut_check(int64_t begin, int64_t end, int64_t nbytes, int64_t block, ck_error *error) {
    if (begin >= 0 && begin <= end && end <= nbytes && begin % block == 0 &&
        (end % block == 0 || end == nbytes))
        return true;
    return ck_value_error(error, "the window [%lld, %lld) is not cut at multiples of %lld within %lld bytes",
                          (long long)begin, (long long)end, (long long)block, (long long)nbytes);
}

bool ck_pack_prepare(ck_pack *pack, ck_error *error);
void ck_pack_run(ck_pack *pack);
void ck_pack_free(ck_pack *pack);

/* ---- seal (seal.c) ---- */

typedef struct {
    unsigned char *image; /* of byte `begin` */
    int64_t fixed;
    int64_t begin, end;     /* the window: blocks and descriptors outside of it are left alone */
    const int64_t *extents; /* rows of 4 */
    int64_t n_extents;
    int64_t block;
    const uint32_t *piece_crcs;
    int64_t n_pieces;
    uint32_t *entry_crcs;
    int64_t n_entries;
    uint32_t *block_crcs;
    int64_t n_blocks;
    int threads;
    /* set by run */
    uint32_t shift;
    const ck_variant *variant;
} ck_seal;

bool ck_seal_prepare(ck_seal *seal, ck_error *error);
void ck_seal_run(ck_seal *seal);

/* ---- scatter (scatter.c) ---- */

typedef struct {
    int64_t fixed, block;
    bool unverified; /* a file of another format, which has no CRCs: its bytes are taken as they are */
    const uint32_t *block_crcs;
    int64_t n_blocks;
    const int64_t *ops, *index;
    int64_t ops_length, n_ops;
    /* set by prepare */
    int64_t step;   /* bytes verified before they are scattered */
    int64_t *reach; /* the highest end of ops 0..i, so that a binary search finds the first in a range */
    const ck_variant *variant;
} ck_scatter;

bool ck_scatter_prepare(ck_scatter *scatter, ck_error *error);
bool ck_range_check(const ck_scatter *scatter, int64_t position, int64_t nbytes, const char *what,
                    ck_error *error);
void ck_scatter_free(ck_scatter *scatter);
/* Verifies, then scatters, one range on the calling thread. Returns -1 or the first damaged block. */
int64_t ck_scatter_range(const ck_scatter *scatter, const unsigned char *bytes, int64_t position,
                         int64_t nbytes);
/* Scatters one range that somebody has verified. */
void ck_scatter_verified(const ck_scatter *scatter, const unsigned char *bytes, int64_t position,
                         int64_t nbytes);
/* Verifies and scatters one range on several threads. */
int64_t ck_scatter_run(const ck_scatter *scatter, const unsigned char *bytes, int64_t position,
                       int64_t nbytes, int threads);

/* ---- direct I/O (direct_io.c) ---- */

typedef struct {
    int64_t position, nbytes;
} ck_request;

typedef struct {
    int fd;
    ck_scatter scatter;
    const int64_t *ranges; /* rows of 2 */
    int64_t n_ranges;
    int64_t request_nbytes;
    int threads;
    /* set by prepare */
    ck_request *requests;
    int64_t n_requests;
} ck_load;

bool ck_load_prepare(ck_load *load, ck_error *error);
/* Returns -1 or the lowest damaged block; error->kind tells a failed read. */
int64_t ck_load_run(ck_load *load, ck_error *error);
void ck_load_free(ck_load *load);

bool ck_write_run(int fd, const unsigned char *bytes, int64_t nbytes, int64_t position,
                  int64_t request_nbytes, int depth, ck_error *error);

/* ---- the window that the ranks of a node share (share.c) ---- */

#define CK_MAX_RANKS 4096
#define CK_MAX_SLOTS 4096

typedef enum { CK_READY = 0, CK_STOPPED, CK_LATE } ck_outcome;

typedef struct {
    unsigned char *base; /* control words, then the slots */
    int64_t nbytes;
    int64_t slots, slot_nbytes;
    int64_t ranks, rank; /* of the node; this one */
} ck_window;

typedef struct {
    ck_window window;
    ck_scatter scatter;
    const int64_t *requests; /* rows of 3: number, position, nbytes */
    int64_t n_requests;
    int64_t nanoseconds; /* how long each wait may take */
    int threads;
} ck_consume;

/* Bytes of the control words, a multiple of CK_ALIGNMENT; only for numbers that ck_window_check admits. */
int64_t ck_window_control(int64_t slots, int64_t ranks);
bool ck_window_check(const ck_window *window, ck_error *error);
unsigned char *ck_window_slot(const ck_window *window, int64_t request);

/* The reader: once checked, waits until the slot of a request is free, which `consumers`, those of the
 * request that had it before, decide; then publishes what it has put there. */
bool ck_share_check(const ck_window *window, int64_t request, const int64_t *ranks, int64_t n,
                    ck_error *error);
ck_outcome ck_share_wait(const ck_window *window, int64_t request, const int64_t *consumers, int64_t n,
                         int64_t nanoseconds);
void ck_share_publish(const ck_window *window, int64_t request);
void ck_share_stop(const ck_window *window); /* ends all waits on all ranks, for good */

/* A consumer: scatters its requests as they are published. After CK_LATE the same call goes on where it was.
 */
bool ck_consume_prepare(ck_consume *consume, ck_error *error);
ck_outcome ck_consume_run(const ck_consume *consume);
void ck_consume_free(ck_consume *consume);

#endif

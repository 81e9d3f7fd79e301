/* pack: tensors into the image, and the CRC32 of every piece of it, in one pass over the memory. */
#include "ckptengine.h"

#include <stdlib.h>
#include <string.h>

#define UNIT_MOST (1 << 20)    /* bytes that a thread takes at a time */
#define UNIT_STRIDED (2 << 20) /* the same where a transposed source wants many rows at a time */
#define UNIT_LEAST (1 << 16)   /* below this a thread costs more than it saves */
#define OP_COST 64             /* what an op costs beside its bytes, in bytes copied */
#define STEP (1 << 16) /* strided bytes gathered before they are checksummed: they stay in the cache */
#define FUSED_RUN 1024 /* shorter contiguous runs are gathered first */

static const unsigned char zeros[4096];

enum { FILE_POS, NBYTES, CRC_INDEX, ITEMSIZE, NDIM, ADDRESS, LOW, SIZE, SHAPES };

static ck_view_row row_of(const int64_t *op, int64_t number) {
    int64_t ndim = op[NDIM];
    return (ck_view_row){.op = number,
                         .itemsize = op[ITEMSIZE],
                         .ndim = ndim,
                         .nbytes = op[NBYTES],
                         .address = op[ADDRESS],
                         .low = op[LOW],
                         .size = op[SIZE],
                         .dense = op + SHAPES,
                         .offset = NULL,
                         .box = op + SHAPES + ndim,
                         .stride = op + SHAPES + 2 * ndim};
}

/* ---- prepare ---- */

static bool check_op(const ck_pack *pack, int64_t number, ck_error *error) {
    long long shown = number;
    int64_t end;
    const int64_t *op = ck_op_at(pack->ops, pack->ops_length, pack->index, number, SHAPES, NDIM, 3, error);
    if (op == NULL)
        return false;
    if (op[FILE_POS] < 0 || op[NBYTES] < 0 || __builtin_add_overflow(op[FILE_POS], op[NBYTES], &end) ||
        end > pack->image_nbytes)
        return ck_value_error(
            error, "op %lld: file_pos %lld + nbytes %lld lies outside of the image of %lld bytes", shown,
            (long long)op[FILE_POS], (long long)op[NBYTES], (long long)pack->image_nbytes);
    int64_t pieces = ck_pieces(op[FILE_POS], op[NBYTES], pack->block);
    if (op[CRC_INDEX] < 0 || pieces > pack->n_crcs || op[CRC_INDEX] > pack->n_crcs - pieces)
        return ck_value_error(error,
                              "op %lld: crc_index %lld + %lld pieces lies outside of the table of %lld CRCs",
                              shown, (long long)op[CRC_INDEX], (long long)pieces, (long long)pack->n_crcs);
    if (op[ADDRESS] == 0 && pack->image == NULL && op[NBYTES] > 0)
        return ck_value_error(error, "op %lld: src_address is 0, but there is no image that holds the bytes",
                              shown);
    ck_view_row row = row_of(op, number);
    return ck_view_check(&row, false, error);
}

/* Whether neighbouring elements of the dense array lie apart in memory. */
static bool strided(const int64_t *op) {
    const int64_t *box = op + SHAPES + op[NDIM], *stride = box + op[NDIM];
    int64_t i = op[NDIM] - 1;
    while (i >= 0 && box[i] == 1)
        i--;
    return i >= 0 && op[ADDRESS] != 0 && stride[i] != op[ITEMSIZE];
}

/* Bytes for each of the units, so that all threads have some: at most `most`. */
static int64_t share(const ck_pack *pack, int64_t total, int64_t most) {
    int64_t part = total / (4 * pack->threads);
    return part > most ? most : part < UNIT_LEAST ? UNIT_LEAST : part;
}

/* The start of a piece in its op's dense array. */
static int64_t piece_start(const ck_pack *pack, const int64_t *op, int64_t piece) {
    return piece == 0 ? 0 : (op[FILE_POS] / pack->block + piece) * pack->block - op[FILE_POS];
}

/* The pieces of an op that lie in the window, [*first, returned). */
static int64_t pieces_within(const ck_pack *pack, const int64_t *op, int64_t *first) {
    int64_t pieces = ck_pieces(op[FILE_POS], op[NBYTES], pack->block), block = op[FILE_POS] / pack->block;
    int64_t low = pack->begin / pack->block, high = ck_pieces(0, pack->end, pack->block);
    *first = low > block ? low - block : 0;
    return high - block < pieces ? high - block : pieces;
}

/* Cuts the ops into units at piece boundaries; only counts them where units is NULL. */
static int64_t cut(const ck_pack *pack, int64_t total, ck_unit *units) {
    int64_t n = 0, room = 0;
    int64_t usual = share(pack, total, UNIT_MOST), large = share(pack, total, UNIT_STRIDED);
    for (int64_t number = 0; number < pack->n_ops; number++) {
        const int64_t *op = pack->ops + pack->index[number];
        int64_t piece, pieces = pieces_within(pack, op, &piece),
                       left = op[NBYTES] - piece_start(pack, op, piece);
        int64_t most = pieces > 1 && strided(op) ? large : usual;
        while (piece < pieces) {
            if (room <= 0) {
                if (units != NULL)
                    units[n] = (ck_unit){number, piece};
                n++;
                room = most;
            }
            int64_t take = pieces - piece, taken = left;
            if (left > room) {
                take = room / pack->block;
                take = take < 1 ? 1 : take > pieces - piece ? pieces - piece : take;
                /* the first piece may be short: an estimate is enough for room */
                if (__builtin_mul_overflow(take, pack->block, &taken) || taken > left)
                    taken = left;
            }
            piece += take;
            left -= taken;
            room -= taken + OP_COST;
        }
    }
    return n;
}

bool ck_pack_prepare(ck_pack *pack, ck_error *error) {
    int64_t total = 0;
    pack->units = NULL;
    pack->scratch = NULL;
    pack->scratch_nbytes = STEP;
    if (!ck_cut_check(pack->begin, pack->end, pack->image_nbytes, pack->block, error))
        return false;
    for (int64_t number = 0; number < pack->n_ops; number++) {
        if (!check_op(pack, number, error))
            return false;
        const int64_t *op = pack->ops + pack->index[number];
        if (__builtin_add_overflow(total, op[NBYTES], &total))
            return ck_value_error(error, "op %lld: the ops' bytes together overflow", (long long)number);
        if (op[NBYTES] > STEP && strided(op))
            pack->scratch_nbytes = UNIT_STRIDED;
    }
    if (total > pack->end - pack->begin)
        total = pack->end - pack->begin;
    pack->n_units = cut(pack, total, NULL);
    if (pack->n_units == 0)
        return true;
    pack->units = malloc((size_t)pack->n_units * sizeof *pack->units);
    if (pack->units == NULL)
        return ck_memory_error(error);
    cut(pack, total, pack->units);
    if (pack->threads > pack->n_units)
        pack->threads = (int)pack->n_units;
    pack->scratch = malloc((size_t)pack->threads * (size_t)pack->scratch_nbytes);
    if (pack->scratch == NULL) {
        ck_pack_free(pack);
        return ck_memory_error(error);
    }
    return true;
}

void ck_pack_free(ck_pack *pack) {
    free(pack->units);
    free(pack->scratch);
    pack->units = NULL;
    pack->scratch = NULL;
}

/* ---- run ---- */

/* Where the next byte of an op belongs among its pieces. */
typedef struct {
    const ck_variant *variant;
    uint32_t *crc; /* of the current piece */
    int64_t block;
    int64_t piece_left; /* bytes until the piece's end, or its block's */
    int64_t left;       /* bytes until the unit's end */
    uint32_t state;
} piece_cursor;

/* Checksums nbytes, and copies them to target unless that is NULL. */
static void take(piece_cursor *cursor, unsigned char *target, const unsigned char *source, int64_t nbytes) {
    while (nbytes > 0) {
        int64_t part = nbytes < cursor->piece_left ? nbytes : cursor->piece_left;
        if (target != NULL) {
            cursor->state = cursor->variant->copy(cursor->state, target, source, (size_t)part);
            target += part;
        } else {
            cursor->state = cursor->variant->update(cursor->state, source, (size_t)part);
        }
        source += part;
        nbytes -= part;
        cursor->left -= part;
        cursor->piece_left -= part;
        if (cursor->piece_left == 0 || cursor->left == 0) {
            *cursor->crc++ = ~cursor->state;
            cursor->state = ~0u;
            cursor->piece_left = cursor->block;
        }
    }
}

static void take_zeros(piece_cursor *cursor, unsigned char *target, int64_t nbytes) {
    while (nbytes > 0) {
        int64_t part = nbytes < (int64_t)sizeof zeros ? nbytes : (int64_t)sizeof zeros;
        take(cursor, target, zeros, part);
        if (target != NULL)
            target += part;
        nbytes -= part;
    }
}

/* Rows long enough to be copied and checksummed in one pass, without a detour. */
static void pack_runs(piece_cursor *cursor, const ck_view *view, unsigned char *dense, int64_t begin,
                      int64_t end) {
    ck_walk walk;
    ck_part part;
    int64_t row_stride = view->ndim > 1 ? view->stride[view->ndim - 2] : 0;
    int64_t done = begin;
    for (ck_walk_start(&walk, view, begin, end); ck_walk_next(&walk, &part);)
        for (int64_t row = 0; row < part.rows; row++) {
            int64_t position = part.position + row * part.pitch;
            take_zeros(cursor, dense != NULL ? dense + done : NULL, position - done);
            take(cursor, dense != NULL ? dense + position : NULL, part.memory + row * row_stride,
                 part.nbytes);
            done = position + part.nbytes;
        }
    take_zeros(cursor, dense != NULL ? dense + done : NULL, end - done);
}

/* Bytes [begin, end) of one op's dense array. */
static void pack_op(const ck_pack *pack, int64_t number, int64_t begin, int64_t end, unsigned char *scratch) {
    const int64_t *op = pack->ops + pack->index[number];
    int64_t at = op[FILE_POS] + begin;
    piece_cursor cursor = {.variant = pack->variant,
                           .crc =
                               pack->crcs + op[CRC_INDEX] + (at / pack->block - op[FILE_POS] / pack->block),
                           .block = pack->block,
                           .piece_left = pack->block - at % pack->block,
                           .left = end - begin,
                           .state = ~0u};
    /* of byte 0 of the dense array, which may lie before the window: never touched there */
    unsigned char *dense =
        pack->image != NULL
            ? (unsigned char *)((uintptr_t)pack->image + (uintptr_t)(op[FILE_POS] - pack->begin))
            : NULL;
    if (op[ADDRESS] == 0) {
        take(&cursor, NULL, dense + begin, end - begin);
        return;
    }
    if (dense != NULL)
        ck_count(CK_COPIED, end - begin);
    ck_view_row row = row_of(op, number);
    ck_view view;
    ck_view_set(&view, &row);
    if (view.contiguous && (view.ndim == 1 || view.box[view.ndim - 1] >= FUSED_RUN)) {
        pack_runs(&cursor, &view, dense, begin, end);
        return;
    }
    int64_t step = ck_view_transposed(&view) ? pack->scratch_nbytes : STEP;
    for (int64_t from = begin; from < end; from += step) {
        int64_t to = end - from < step ? end : from + step;
        ck_gather(&view, from, to, scratch);
        take(&cursor, dense != NULL ? dense + from : NULL, scratch, to - from);
    }
}

static bool pack_unit(void *context, int64_t unit, int worker) {
    const ck_pack *pack = context;
    ck_unit from = pack->units[unit],
            to = unit + 1 < pack->n_units ? pack->units[unit + 1] : (ck_unit){pack->n_ops, 0};
    unsigned char *scratch = pack->scratch + worker * pack->scratch_nbytes;
    for (int64_t number = from.op; number <= to.op && number < pack->n_ops; number++) {
        const int64_t *op = pack->ops + pack->index[number];
        int64_t begin = number == from.op ? piece_start(pack, op, from.piece) : 0;
        int64_t end = number == to.op ? piece_start(pack, op, to.piece) : op[NBYTES];
        int64_t low = pack->begin - op[FILE_POS], high = pack->end - op[FILE_POS];
        begin = begin < low ? low : begin;
        end = end > high ? high : end;
        if (begin < end)
            pack_op(pack, number, begin, end, scratch);
    }
    ck_fence(); /* non-temporal stores must be seen by whoever joins this thread */
    return true;
}

void ck_pack_run(ck_pack *pack) {
    ck_parallel(pack->n_units, pack->threads, pack_unit, pack);
}

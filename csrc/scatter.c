/* scatter: verified bytes of a file, out into the tensors that want them. */
#include "ckptengine.h"

#include <stdlib.h>

#define STEP (1 << 18)      /* bytes verified before they are scattered: they stay in the cache */
#define STEP_MOST (2 << 20) /* the same where a transposed destination wants many rows at a time */
#define ROWS 64             /* that many */

enum { FILE_POS, NBYTES, ITEMSIZE, NDIM, ADDRESS, LOW, SIZE, SHAPES };

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
                         .offset = op + SHAPES + ndim,
                         .box = op + SHAPES + 2 * ndim,
                         .stride = op + SHAPES + 3 * ndim};
}

static bool check_op(const ck_scatter *scatter, int64_t number, int64_t *end, ck_error *error) {
    long long shown = number;
    const int64_t *op =
        ck_op_at(scatter->ops, scatter->ops_length, scatter->index, number, SHAPES, NDIM, 4, error);
    if (op == NULL)
        return false;
    if (op[FILE_POS] < 0 || op[NBYTES] < 0 || __builtin_add_overflow(op[FILE_POS], op[NBYTES], end) ||
        *end > scatter->fixed)
        return ck_value_error(
            error, "op %lld: file_pos %lld + nbytes %lld lies outside of the fixed region of %lld bytes",
            shown, (long long)op[FILE_POS], (long long)op[NBYTES], (long long)scatter->fixed);
    if (number > 0 && op[FILE_POS] < scatter->ops[scatter->index[number - 1] + FILE_POS])
        return ck_value_error(error, "op %lld: file_pos %lld comes before that of the op before it", shown,
                              (long long)op[FILE_POS]);
    ck_view_row row = row_of(op, number);
    return ck_view_check(&row, true, error);
}

/* The step that suits an op and those before it. */
static int64_t step_for(const ck_scatter *scatter, int64_t number) {
    const int64_t *op = scatter->ops + scatter->index[number];
    if (op[NBYTES] <= scatter->step || scatter->step == STEP_MOST)
        return scatter->step;
    ck_view_row row = row_of(op, number);
    ck_view view;
    ck_view_set(&view, &row);
    if (!ck_view_transposed(&view))
        return scatter->step;
    int64_t pitch = view.dense[view.ndim - 1] * view.itemsize;
    int64_t step = pitch > STEP_MOST / ROWS ? STEP_MOST : pitch * ROWS;
    return step > scatter->step ? step : scatter->step;
}

bool ck_scatter_prepare(ck_scatter *scatter, ck_error *error) {
    scatter->reach = NULL;
    scatter->variant = ck_variant_named(NULL);
    if (scatter->block <= 0 || scatter->fixed < 0)
        return ck_value_error(error, "block_nbytes %lld must be positive, fixed_nbytes %lld not negative",
                              (long long)scatter->block, (long long)scatter->fixed);
    if (!scatter->unverified && scatter->n_blocks < ck_pieces(0, scatter->fixed, scatter->block))
        return ck_value_error(error, "block_crcs has %lld entries, but the fixed region has %lld blocks",
                              (long long)scatter->n_blocks,
                              (long long)ck_pieces(0, scatter->fixed, scatter->block));
    scatter->step = STEP;
    if (scatter->n_ops == 0)
        return true;
    scatter->reach = malloc((size_t)scatter->n_ops * sizeof *scatter->reach);
    if (scatter->reach == NULL)
        return ck_memory_error(error);
    int64_t reach = 0;
    for (int64_t number = 0; number < scatter->n_ops; number++) {
        int64_t end = 0;
        if (!check_op(scatter, number, &end, error)) {
            ck_scatter_free(scatter);
            return false;
        }
        scatter->step = step_for(scatter, number);
        reach = end > reach ? end : reach;
        scatter->reach[number] = reach;
    }
    return true;
}

void ck_scatter_free(ck_scatter *scatter) {
    free(scatter->reach);
    scatter->reach = NULL;
}

bool ck_range_check(const ck_scatter *scatter, int64_t position, int64_t nbytes, const char *what,
                    ck_error *error) {
    int64_t end;
    if (position < 0 || nbytes < 0 || __builtin_add_overflow(position, nbytes, &end) || end > scatter->fixed)
        return ck_value_error(
            error, "%s: position %lld + nbytes %lld lies outside of the fixed region of %lld bytes", what,
            (long long)position, (long long)nbytes, (long long)scatter->fixed);
    if (position % scatter->block != 0 || (end % scatter->block != 0 && end != scatter->fixed))
        return ck_value_error(error, "%s: [%lld, %lld) is not cut at multiples of block_nbytes %lld", what,
                              (long long)position, (long long)end, (long long)scatter->block);
    return true;
}

/* ---- run ---- */

static int64_t verify(const ck_scatter *scatter, const unsigned char *bytes, int64_t position,
                      int64_t nbytes) {
    if (scatter->unverified)
        return -1;
    int64_t block = position / scatter->block;
    for (int64_t at = 0; at < nbytes; at += scatter->block, block++) {
        int64_t part = nbytes - at < scatter->block ? nbytes - at : scatter->block;
        if (~scatter->variant->update(~0u, bytes + at, (size_t)part) != scatter->block_crcs[block])
            return block;
    }
    return -1;
}

static void scatter_bytes(const ck_scatter *scatter, const unsigned char *bytes, int64_t position,
                          int64_t nbytes) {
    int64_t end = position + nbytes, low = 0, high = scatter->n_ops;
    while (low < high) { /* the first op that reaches beyond position */
        int64_t middle = low + (high - low) / 2;
        if (scatter->reach[middle] > position)
            high = middle;
        else
            low = middle + 1;
    }
    for (int64_t number = low; number < scatter->n_ops; number++) {
        const int64_t *op = scatter->ops + scatter->index[number];
        if (op[FILE_POS] >= end)
            break;
        int64_t from = op[FILE_POS] > position ? op[FILE_POS] : position;
        int64_t to = op[FILE_POS] + op[NBYTES] < end ? op[FILE_POS] + op[NBYTES] : end;
        if (from >= to)
            continue;
        ck_view_row row = row_of(op, number);
        ck_view view;
        ck_view_set(&view, &row);
        ck_scatter_view(&view, from - op[FILE_POS], to - op[FILE_POS], bytes + (from - position));
        ck_count(CK_COPIED, to - from);
    }
}

/* Whole blocks, at least one. */
static int64_t step_of(const ck_scatter *scatter) {
    return scatter->block >= scatter->step ? scatter->block : scatter->step / scatter->block * scatter->block;
}

int64_t ck_scatter_range(const ck_scatter *scatter, const unsigned char *bytes, int64_t position,
                         int64_t nbytes) {
    int64_t step = step_of(scatter);
    for (int64_t at = 0; at < nbytes; at += step) {
        int64_t part = nbytes - at < step ? nbytes - at : step;
        int64_t damaged = verify(scatter, bytes + at, position + at, part);
        if (damaged >= 0)
            return damaged;
        scatter_bytes(scatter, bytes + at, position + at, part);
    }
    ck_fence(); /* non-temporal stores must be seen by whoever joins this thread */
    return -1;
}

void ck_scatter_verified(const ck_scatter *scatter, const unsigned char *bytes, int64_t position,
                         int64_t nbytes) {
    scatter_bytes(scatter, bytes, position, nbytes);
    ck_fence();
}

typedef struct {
    const ck_scatter *scatter;
    const unsigned char *bytes;
    int64_t position, nbytes, step;
    atomic_int_fast64_t damaged; /* the lowest found, or INT64_MAX */
} scatter_job;

static bool scatter_unit(void *context, int64_t unit, int worker) {
    (void)worker;
    scatter_job *job = context;
    int64_t at = unit * job->step, part = job->nbytes - at < job->step ? job->nbytes - at : job->step;
    int64_t damaged = ck_scatter_range(job->scatter, job->bytes + at, job->position + at, part);
    if (damaged < 0)
        return true;
    /* units are pulled in order and finished, so the lowest damaged block is always found */
    int_fast64_t lowest = atomic_load(&job->damaged);
    while (damaged < lowest && !atomic_compare_exchange_weak(&job->damaged, &lowest, damaged)) {
    }
    return false;
}

int64_t ck_scatter_run(const ck_scatter *scatter, const unsigned char *bytes, int64_t position,
                       int64_t nbytes, int threads) {
    scatter_job job = {
        .scatter = scatter, .bytes = bytes, .position = position, .nbytes = nbytes, .step = step_of(scatter)};
    atomic_init(&job.damaged, INT64_MAX);
    int64_t units = nbytes == 0 ? 0 : (nbytes - 1) / job.step + 1;
    ck_parallel(units, threads, scatter_unit, &job);
    int64_t damaged = atomic_load(&job.damaged);
    return damaged == INT64_MAX ? -1 : damaged;
}

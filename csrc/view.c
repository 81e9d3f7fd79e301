/* Strided n-dimensional views: their bounds, their simplest form, and the walk over a byte range of them. */
#include "ckptengine.h"

#include <stdlib.h>

/* ---- checks ---- */

static bool product(const int64_t *shape, int64_t ndim, int64_t itemsize, int64_t *nbytes) {
    bool empty = false, fits = true;
    int64_t total = itemsize;
    for (int64_t i = 0; i < ndim; i++) {
        empty = empty || shape[i] == 0;
        fits = fits && !__builtin_mul_overflow(total, shape[i], &total);
    }
    if (empty)
        total = 0;
    *nbytes = total;
    return empty || fits;
}

const int64_t *ck_op_at(const int64_t *ops, int64_t length, const int64_t *index, int64_t number, int head,
                        int ndim_at, int per_dim, ck_error *error) {
    int64_t from = index[number], to = index[number + 1];
    /* In this order each comparison is safe whatever the values: 0 <= from <= to <= length before any
     * difference. */
    if (from >= 0 && from <= to && to <= length && to - from >= head) {
        int64_t ndim = ops[from + ndim_at];
        if (ndim >= 0 && ndim <= CK_MAX_NDIM && to - from == head + per_dim * ndim)
            return ops + from;
    }
    ck_value_error(error, "op %lld: index entries [%lld, %lld) do not hold one op of the %lld values given",
                   (long long)number, (long long)from, (long long)to, (long long)length);
    return NULL;
}

bool ck_view_check(const ck_view_row *row, bool writes, ck_error *error) {
    const char *kind = writes ? "destination" : "source";
    long long op = row->op;
    switch (row->itemsize) {
    case 1:
    case 2:
    case 4:
    case 8:
    case 16:
        break;
    default:
        return ck_value_error(error, "op %lld: itemsize %lld is none of 1, 2, 4, 8, 16", op,
                              (long long)row->itemsize);
    }
    bool empty = false;
    for (int64_t i = 0; i < row->ndim; i++) {
        int64_t dense = row->dense[i], box = row->box[i], offset = row->offset != NULL ? row->offset[i] : 0;
        if (dense < 0 || box < 0 || box > dense || offset < 0 || offset > dense - box)
            return ck_value_error(
                error,
                "op %lld: dimension %lld: the box (offset %lld, length %lld) lies outside of "
                "the dense length %lld",
                op, (long long)i, (long long)offset, (long long)box, (long long)dense);
        empty = empty || box == 0;
    }
    int64_t dense_nbytes;
    if (!product(row->dense, row->ndim, row->itemsize, &dense_nbytes) || dense_nbytes != row->nbytes)
        return ck_value_error(error, "op %lld: nbytes is %lld, but the dense shape does not have that size",
                              op, (long long)row->nbytes);
    if (empty || (!writes && row->address == 0))
        return true; /* no memory is touched */
    if (row->address == 0)
        return ck_value_error(error, "op %lld: the destination address is 0", op);
    int64_t low = row->address, high = row->address;
    bool fits = !__builtin_add_overflow(high, row->itemsize, &high);
    for (int64_t i = 0; fits && i < row->ndim; i++) {
        int64_t box = row->box[i], stride = row->stride[i], extent;
        if (box == 1)
            continue;
        if (writes && stride > -row->itemsize && stride < row->itemsize)
            return ck_value_error(error,
                                  "op %lld: dimension %lld: destination elements overlap (stride %lld, "
                                  "itemsize %lld)",
                                  op, (long long)i, (long long)stride, (long long)row->itemsize);
        fits = !__builtin_mul_overflow(box - 1, stride, &extent) &&
               !(extent < 0 ? __builtin_add_overflow(low, extent, &low)
                            : __builtin_add_overflow(high, extent, &high));
    }
    int64_t limit;
    if (!fits || row->low < 0 || row->size < 0 || __builtin_add_overflow(row->low, row->size, &limit) ||
        low < row->low || high > limit)
        return ck_value_error(
            error,
            "op %lld: the %s strides reach bytes [%lld, %lld) relative to the memory given, "
            "which has %lld bytes",
            op, kind, fits ? (long long)((uint64_t)low - (uint64_t)row->low) : 0LL,
            fits ? (long long)((uint64_t)high - (uint64_t)row->low) : -1LL, (long long)row->size);
    return true;
}

/* ---- simplification ---- */

static void set_trivial(ck_view *view, int64_t nbytes) {
    view->itemsize = 1;
    view->ndim = 1;
    view->contiguous = true;
    view->dense[0] = nbytes;
    view->offset[0] = view->box[0] = 0;
    view->stride[0] = 1;
}

void ck_view_set(ck_view *view, const ck_view_row *row) {
    view->base = (unsigned char *)(uintptr_t)row->address;
    int n = 0;
    for (int64_t i = 0; i < row->ndim; i++) {
        int64_t dense = row->dense[i], box = row->box[i], stride = row->stride[i];
        int64_t offset = row->offset != NULL ? row->offset[i] : 0;
        if (box == 0) {
            set_trivial(view, row->nbytes);
            return;
        }
        if (dense == 1)
            continue;
        if (box == 1)
            stride = 0; /* never used, and may be anything */
        int64_t outer;
        if (n > 0 && box == dense && !__builtin_mul_overflow(stride, box, &outer) &&
            (view->box[n - 1] == 1 || view->stride[n - 1] == outer)) {
            view->dense[n - 1] *= dense;
            view->offset[n - 1] *= dense;
            view->box[n - 1] *= dense;
            view->stride[n - 1] = stride;
            continue;
        }
        view->dense[n] = dense;
        view->offset[n] = offset;
        view->box[n] = box;
        view->stride[n] = stride;
        n++;
    }
    int64_t itemsize = row->itemsize;
    if (n == 0) {
        view->dense[0] = view->box[0] = 1;
        view->offset[0] = 0;
        view->stride[0] = itemsize;
        n = 1;
    }
    int inner = n - 1;
    if (view->box[inner] == 1)
        view->stride[inner] = itemsize;
    view->contiguous = view->stride[inner] == itemsize;
    if (view->contiguous) {
        int64_t run = view->dense[inner] * itemsize; /* at most nbytes */
        bool whole = view->box[inner] == view->dense[inner];
        if (whole && n >= 2 && (run == 2 || run == 4 || run == 8 || run == 16)) {
            itemsize = run; /* short whole rows are elements of a larger type */
            view->contiguous = false;
            n--;
        } else {
            view->dense[inner] = run;
            view->offset[inner] *= itemsize;
            view->box[inner] *= itemsize;
            view->stride[inner] = 1;
            itemsize = 1;
        }
    }
    view->itemsize = itemsize;
    view->ndim = n;
}

/* ---- the walk ---- */

enum { HEAD, WHOLE, TAIL, DONE };

static uint64_t times(int64_t count, int64_t stride) {
    return (uint64_t)count * (uint64_t)stride; /* modulo 2^64, as addresses are */
}

/* Finds the first element of the box at or after `element`; false where there is none. */
static bool place(ck_walk *walk, int64_t element) {
    const ck_view *view = walk->view;
    int n = view->ndim;
    for (int i = n - 1; i >= 0; i--) {
        walk->at[i] = element % view->dense[i];
        element /= view->dense[i];
    }
    for (int i = 0; i < n; i++) {
        int reset;
        if (walk->at[i] < view->offset[i]) {
            reset = i;
        } else if (walk->at[i] >= view->offset[i] + view->box[i]) {
            int j = i - 1;
            while (j >= 0 && walk->at[j] + 1 >= view->offset[j] + view->box[j])
                j--;
            if (j < 0)
                return false;
            walk->at[j]++;
            reset = j + 1;
        } else {
            continue;
        }
        for (int j = reset; j < n; j++)
            walk->at[j] = view->offset[j];
        break;
    }
    uint64_t row = (uint64_t)(uintptr_t)view->base;
    walk->row_start = 0;
    for (int i = 0; i < n - 1; i++) {
        walk->row_start += walk->at[i] * walk->pitch[i];
        row += times(walk->at[i] - view->offset[i], view->stride[i]);
    }
    walk->row = row;
    walk->column = walk->at[n - 1];
    return true;
}

/* Moves on by whole rows of the second innermost dimension, none of them beyond the box's end there. */
static void advance(ck_walk *walk, int64_t rows) {
    const ck_view *view = walk->view;
    walk->column = view->offset[view->ndim - 1];
    for (int i = view->ndim - 2; i >= 0; i--, rows = 1) {
        walk->at[i] += rows;
        walk->row += times(rows, view->stride[i]);
        walk->row_start += rows * walk->pitch[i];
        if (walk->at[i] < view->offset[i] + view->box[i])
            return;
        walk->at[i] = view->offset[i];
        walk->row -= times(view->box[i], view->stride[i]);
        walk->row_start -= view->box[i] * walk->pitch[i];
    }
    walk->last = walk->row_start; /* no row is left */
}

void ck_walk_start(ck_walk *walk, const ck_view *view, int64_t begin, int64_t end) {
    walk->view = view;
    walk->begin = begin;
    walk->end = end;
    walk->stage = HEAD;
    int64_t pitch = 1;
    for (int i = view->ndim - 1; i >= 0; i--) {
        walk->pitch[i] = pitch;
        pitch *= view->dense[i];
    }
}

/* A piece of one element, bytes [begin, end) of the dense array; false where the element is outside of the
 * box. */
static bool partial(ck_walk *walk, int64_t element, int64_t begin, int64_t end, ck_part *part) {
    const ck_view *view = walk->view;
    if (!place(walk, element) || walk->row_start + walk->column != element)
        return false;
    int inner = view->ndim - 1;
    uint64_t address = walk->row + times(walk->column - view->offset[inner], view->stride[inner]);
    *part = (ck_part){
        .position = begin,
        .nbytes = end - begin,
        .pitch = end - begin,
        .rows = 1,
        .memory = (unsigned char *)(uintptr_t)(address + (uint64_t)(begin - element * view->itemsize)),
        .partial = true};
    return true;
}

static bool whole(ck_walk *walk, ck_part *part) {
    const ck_view *view = walk->view;
    int inner = view->ndim - 1;
    int64_t size = view->itemsize, dense = view->dense[inner], box = view->box[inner],
            offset = view->offset[inner];
    int64_t position = walk->row_start + walk->column;
    if (position >= walk->last)
        return false;
    uint64_t address = walk->row + times(walk->column - offset, view->stride[inner]);
    int64_t rows = 1, columns = offset + box - walk->column;
    if (columns > walk->last - position)
        columns = walk->last - position;
    if (columns == box && inner > 0) {
        int64_t left = view->offset[inner - 1] + view->box[inner - 1] - walk->at[inner - 1];
        rows = (walk->last - position - box) / dense + 1;
        if (rows > left)
            rows = left;
    }
    *part = (ck_part){.position = position * size,
                      .nbytes = columns * size,
                      .pitch = dense * size,
                      .rows = rows,
                      .memory = (unsigned char *)(uintptr_t)address,
                      .partial = false};
    walk->column += columns;
    if (walk->column == offset + box)
        advance(walk, rows);
    return true;
}

bool ck_walk_next(ck_walk *walk, ck_part *part) {
    const ck_view *view = walk->view;
    int64_t size = view->itemsize, begin = walk->begin, end = walk->end;
    if (view->box[0] == 0 || begin >= end)
        return false; /* an empty box has been simplified to one dimension */
    if (walk->stage == HEAD) {
        int64_t element = begin / size, stop = (element + 1) * size;
        walk->stage = WHOLE;
        walk->placed = false;
        walk->last = end / size;
        walk->first = begin % size == 0 ? element : element + 1;
        if (begin % size != 0 && partial(walk, element, begin, end < stop ? end : stop, part))
            return true;
    }
    if (walk->stage == WHOLE) {
        if (!walk->placed) {
            walk->placed = true;
            if (walk->first >= walk->last || !place(walk, walk->first))
                walk->stage = TAIL;
        }
        if (walk->stage == WHOLE && whole(walk, part))
            return true;
        walk->stage = TAIL;
    }
    if (walk->stage == TAIL) {
        int64_t element = end / size;
        walk->stage = DONE;
        if (end % size != 0 && element * size >= begin)
            return partial(walk, element, element * size, end, part);
    }
    return false;
}

/* seal: the pieces' CRCs, combined to those of whole entries and of whole blocks. */
#include "ckptengine.h"

#define EXTENTS_PER_UNIT 512
#define BYTES_PER_UNIT (1 << 20)

enum { FILE_POS, NBYTES, CRC_INDEX, DESCRIPTOR, COLUMNS };

static const int64_t *extent_at(const ck_seal *seal, int64_t number) {
    return seal->extents + number * COLUMNS;
}

/* The last extent that starts before `position`, or -1. */
static int64_t extent_before(const ck_seal *seal, int64_t position) {
    int64_t low = 0, high = seal->n_extents;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (extent_at(seal, middle)[FILE_POS] < position)
            low = middle + 1;
        else
            high = middle;
    }
    return low - 1;
}

static bool check_descriptor(const ck_seal *seal, int64_t number, ck_error *error) {
    int64_t position = extent_at(seal, number)[DESCRIPTOR];
    if (position < 0)
        return true;
    if (position > seal->fixed - 4)
        return ck_value_error(
            error, "extent %lld: descriptor_pos %lld + 4 lies outside of the fixed region of %lld bytes",
            (long long)number, (long long)position, (long long)seal->fixed);
    int64_t before = extent_before(seal, position + 4);
    if (before >= 0 && extent_at(seal, before)[FILE_POS] + extent_at(seal, before)[NBYTES] > position)
        return ck_value_error(error, "extent %lld: descriptor_pos %lld lies within extent %lld",
                              (long long)number, (long long)position, (long long)before);
    return true;
}

bool ck_seal_prepare(ck_seal *seal, ck_error *error) {
    if (seal->block <= 0 || seal->fixed < 0)
        return ck_value_error(error, "block_nbytes %lld must be positive, fixed_nbytes %lld not negative",
                              (long long)seal->block, (long long)seal->fixed);
    if (!ck_cut_check(seal->begin, seal->end, seal->fixed, seal->block, error))
        return false;
    if (seal->image == NULL && seal->fixed > 0)
        return ck_value_error(error, "image_address is 0");
    if (seal->n_entries < seal->n_extents)
        return ck_value_error(error, "entry_crcs has %lld entries for %lld extents",
                              (long long)seal->n_entries, (long long)seal->n_extents);
    int64_t blocks = ck_pieces(0, seal->fixed, seal->block);
    if (seal->n_blocks < blocks)
        return ck_value_error(error, "block_crcs has %lld entries, but the fixed region has %lld blocks",
                              (long long)seal->n_blocks, (long long)blocks);
    int64_t before = 0;
    for (int64_t number = 0; number < seal->n_extents; number++) {
        const int64_t *extent = extent_at(seal, number);
        int64_t end;
        if (extent[FILE_POS] < before || extent[NBYTES] < 0 ||
            __builtin_add_overflow(extent[FILE_POS], extent[NBYTES], &end) || end > seal->fixed)
            return ck_value_error(
                error,
                "extent %lld: [%lld, +%lld) overlaps the one before, is out of order, or lies "
                "outside of the fixed region of %lld bytes",
                (long long)number, (long long)extent[FILE_POS], (long long)extent[NBYTES],
                (long long)seal->fixed);
        before = end;
        int64_t pieces = ck_pieces(extent[FILE_POS], extent[NBYTES], seal->block);
        if (extent[CRC_INDEX] < 0 || pieces > seal->n_pieces || extent[CRC_INDEX] > seal->n_pieces - pieces)
            return ck_value_error(
                error, "extent %lld: crc_index %lld + %lld pieces lies outside of the table of %lld CRCs",
                (long long)number, (long long)extent[CRC_INDEX], (long long)pieces,
                (long long)seal->n_pieces);
    }
    for (int64_t number = 0; number < seal->n_extents; number++)
        if (!check_descriptor(seal, number, error))
            return false;
    return true;
}

/* Whether an extent's CRC is wanted in this window: where its descriptor lies, or its end if it has none. */
static bool within(const ck_seal *seal, const int64_t *extent) {
    int64_t end = extent[FILE_POS] + extent[NBYTES];
    if (extent[DESCRIPTOR] >= 0)
        return extent[DESCRIPTOR] + 4 > seal->begin && extent[DESCRIPTOR] < seal->end;
    return (end > seal->begin || seal->begin == 0) && end <= seal->end;
}

static bool seal_extents(void *context, int64_t unit, int worker) {
    (void)worker;
    const ck_seal *seal = context;
    int64_t end = (unit + 1) * EXTENTS_PER_UNIT;
    for (int64_t number = unit * EXTENTS_PER_UNIT; number < end && number < seal->n_extents; number++) {
        const int64_t *extent = extent_at(seal, number);
        int64_t pieces = ck_pieces(extent[FILE_POS], extent[NBYTES], seal->block);
        const uint32_t *crcs = seal->piece_crcs + extent[CRC_INDEX];
        if (!within(seal, extent))
            continue;
        uint32_t crc = 0;
        if (pieces > 0)
            crc = crcs[0];
        for (int64_t i = 1; i + 1 < pieces; i++)
            crc = ck_combine(crc, crcs[i], seal->shift);
        if (pieces > 1) { /* the last piece may be shorter than a block */
            int64_t tail = (extent[FILE_POS] + extent[NBYTES] - 1) % seal->block + 1;
            crc = ck_combine(crc, crcs[pieces - 1],
                             tail == seal->block ? seal->shift : ck_shift((uint64_t)tail));
        }
        seal->entry_crcs[number] = crc;
        for (int i = 0; extent[DESCRIPTOR] >= 0 && i < 4;
             i++) { /* a window may begin or end within the 4 bytes */
            int64_t at = extent[DESCRIPTOR] + i;
            if (at >= seal->begin && at < seal->end)
                seal->image[at - seal->begin] = (unsigned char)(crc >> 8 * i);
        }
    }
    return true;
}

static int64_t blocks_per_unit(const ck_seal *seal) {
    return seal->block >= BYTES_PER_UNIT ? 1 : BYTES_PER_UNIT / seal->block;
}

static bool seal_blocks(void *context, int64_t unit, int worker) {
    (void)worker;
    const ck_seal *seal = context;
    int64_t count = ck_pieces(0, seal->end, seal->block), per = blocks_per_unit(seal);
    int64_t from = seal->begin / seal->block + unit * per, to = count - from < per ? count : from + per;
    for (int64_t block = from; block < to; block++) {
        int64_t begin = block * seal->block;
        int64_t end = seal->fixed - begin < seal->block ? seal->fixed : begin + seal->block;
        int64_t number = extent_before(seal, begin + 1);
        const int64_t *extent = number >= 0 ? extent_at(seal, number) : NULL;
        if (extent != NULL && extent[FILE_POS] + extent[NBYTES] >= end)
            seal->block_crcs[block] =
                seal->piece_crcs[extent[CRC_INDEX] + block - extent[FILE_POS] / seal->block];
        else
            seal->block_crcs[block] =
                ~seal->variant->update(~0u, seal->image + (begin - seal->begin), (size_t)(end - begin));
    }
    return true;
}

void ck_seal_run(ck_seal *seal) {
    seal->shift = ck_shift((uint64_t)seal->block);
    seal->variant = ck_variant_named(NULL);
    int64_t blocks = ck_pieces(0, seal->end - seal->begin, seal->block), per = blocks_per_unit(seal);
    ck_parallel((seal->n_extents + EXTENTS_PER_UNIT - 1) / EXTENTS_PER_UNIT, seal->threads, seal_extents,
                seal);
    /* only now are the descriptors in the image */
    ck_parallel((blocks + per - 1) / per, seal->threads, seal_blocks, seal);
}

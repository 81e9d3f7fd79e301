/* Checks the core without Python, against references that take no short cuts: a bit-by-bit CRC and copies
 * element by element. Everything comes from one fixed seed. It is what runs on an emulated aarch64. */
#include "ckptengine.h"
#include "drawn.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define GUARD 64
#define FILE_MOST (1 << 20)

/* ---- CRC32 ---- */

static void check_crc(void) {
    static unsigned char source[6000], target[6000 + 2 * GUARD];
    const ck_variant *const *list;
    int n = ck_variants(&list);
    for (int v = 0; v < n; v++) {
        printf("variant %s\n", list[v]->name);
        CHECK(~list[v]->update(~0u, (const unsigned char *)"123456789", 9) == 0xCBF43926u, "the check value");
        for (int turn = 0; turn < 600; turn++) {
            int64_t at = below(64), to = below(64), nbytes = turn < 300 ? turn : below(5000);
            randomize(source, sizeof source);
            uint32_t first = (uint32_t)draw(), wanted = reference_crc(first, source + at, nbytes);
            CHECK(~list[v]->update(~first, source + at, (size_t)nbytes) == wanted, "%d bytes", (int)nbytes);
            memset(target, FILL, sizeof target);
            uint32_t copied = ~list[v]->copy(~first, target + GUARD + to, source + at, (size_t)nbytes);
            ck_fence();
            CHECK(copied == wanted, "%d bytes copied", (int)nbytes);
            CHECK(memcmp(target + GUARD + to, source + at, (size_t)nbytes) == 0, "%d bytes", (int)nbytes);
            CHECK(filled(target, GUARD + to), "before %d bytes", (int)nbytes);
            CHECK(filled(target + GUARD + to + nbytes, (int64_t)sizeof target - GUARD - to - nbytes),
                  "after");
            int64_t cut = nbytes > 0 ? below(nbytes) : 0;
            uint32_t one = reference_crc(0, source, cut), two = reference_crc(0, source + cut, nbytes - cut);
            CHECK(ck_combine(one, two, ck_shift((uint64_t)(nbytes - cut))) ==
                      reference_crc(0, source, nbytes),
                  "combined at %d of %d", (int)cut, (int)nbytes);
        }
    }
}

/* ---- pack and seal ---- */

#define TENSORS 6

static const int64_t blocks[] = {1, 7, 64, 100, 4096, 65536};

static void check_pack(int turn) {
    static unsigned char image[FILE_MOST + 2 * GUARD], wanted[FILE_MOST];
    static int64_t ops[TENSORS * 40], extents[TENSORS * 4], index[TENSORS + 1];
    static uint32_t crcs[FILE_MOST], entries[TENSORS], sealed[FILE_MOST];
    tensor tensors[TENSORS];
    int64_t n = below(TENSORS + 1), length = 0, position = 0, pieces = 0, block = one_of(blocks, 6);
    memset(image, FILL, sizeof image);
    memset(wanted, FILL, sizeof wanted);
    for (int64_t i = 0; i < n; i++) {
        tensor *t = &tensors[i];
        draw_tensor(t, false, turn % 50 == 49 ? 18 : 7);
        randomize(t->memory, t->memory_nbytes);
        position += below(50);
        if (position + t->nbytes + 4 > FILE_MOST) {
            free(t->memory);
            n = i;
            break;
        }
        const int64_t head[] = {position,
                                t->nbytes,
                                pieces,
                                t->itemsize,
                                t->ndim,
                                (int64_t)(uintptr_t)t->first,
                                (int64_t)(uintptr_t)t->memory,
                                t->memory_nbytes};
        length = append(ops, length, head, 8);
        length = append(ops, length, t->dense, t->ndim);
        length = append(ops, length, t->box, t->ndim);
        length = append(ops, length, t->stride, t->ndim);
        index[i + 1] = length;
        const int64_t extent[] = {position, t->nbytes, pieces, position + t->nbytes};
        append(extents, i * 4, extent, 4);
        each(t, wanted + position, take_from);
        pieces += ck_pieces(position, t->nbytes, block);
        position += t->nbytes + 4;
    }
    const ck_variant *const *list;
    int variants = ck_variants(&list);
    ck_error error = {.kind = CK_OK};
    int64_t split = below(position / block + 1) * block; /* two windows, one of which may be empty */
    for (int only_crcs = 1; only_crcs >= 0; only_crcs--) {
        ck_pack pack = {.image_nbytes = position,
                        .ops = ops,
                        .index = index,
                        .ops_length = length,
                        .n_ops = n,
                        .block = block,
                        .crcs = crcs,
                        .n_crcs = pieces,
                        .threads = 1 + (int)below(3),
                        .variant = list[below(variants)]};
        memset(crcs, 0, (size_t)pieces * 4);
        for (int window = 0; window < 2; window++) {
            pack.begin = window ? split : 0;
            pack.end = window ? position : split;
            pack.image = only_crcs ? NULL : image + GUARD + pack.begin;
            CHECK(ck_pack_prepare(&pack, &error), "%s", error.text);
            ck_pack_run(&pack);
            ck_pack_free(&pack);
        }
        for (int64_t i = 0; i < n; i++) {
            int64_t begin = extents[4 * i], stop = begin + extents[4 * i + 1], piece = extents[4 * i + 2];
            while (begin < stop) {
                int64_t end = (begin / block + 1) * block < stop ? (begin / block + 1) * block : stop;
                CHECK(crcs[piece] == reference_crc(0, wanted + begin, end - begin), "turn %d, op %d", turn,
                      (int)i);
                begin = end;
                piece++;
            }
        }
        CHECK(filled(image, only_crcs ? (int64_t)sizeof image : GUARD), "turn %d", turn);
    }
    CHECK(memcmp(image + GUARD, wanted, (size_t)position) == 0, "turn %d", turn);
    CHECK(filled(image + GUARD + position, GUARD), "turn %d", turn);

    ck_seal seal = {.fixed = position,
                    .extents = extents,
                    .n_extents = n,
                    .block = block,
                    .piece_crcs = crcs,
                    .n_pieces = pieces,
                    .entry_crcs = entries,
                    .n_entries = n,
                    .block_crcs = sealed,
                    .n_blocks = ck_pieces(0, position, block),
                    .threads = 2};
    for (int window = 0; window < 2; window++) {
        seal.begin = window ? split : 0;
        seal.end = window ? position : split;
        seal.image = image + GUARD + seal.begin;
        CHECK(ck_seal_prepare(&seal, &error), "%s", error.text);
        ck_seal_run(&seal);
    }
    for (int64_t i = 0; i < n; i++) {
        uint32_t crc = reference_crc(0, wanted + extents[4 * i], extents[4 * i + 1]);
        CHECK(entries[i] == crc, "turn %d, entry %d", turn, (int)i);
        memcpy(wanted + extents[4 * i + 3], &crc, 4);
    }
    CHECK(memcmp(image + GUARD, wanted, (size_t)position) == 0, "turn %d", turn);
    for (int64_t b = 0; b * block < position; b++) {
        int64_t part = position - b * block < block ? position - b * block : block;
        CHECK(sealed[b] == reference_crc(0, wanted + b * block, part), "turn %d, block %d", turn, (int)b);
    }
    for (int64_t i = 0; i < n; i++)
        free(tensors[i].memory);
}

/* ---- scatter, load and write ---- */

static void check_scatter(int turn, int fd) {
    static unsigned char file[FILE_MOST];
    static int64_t ops[TENSORS * 40], index[TENSORS + 1];
    static uint32_t crcs[FILE_MOST];
    tensor tensors[TENSORS];
    unsigned char *wanted[TENSORS];
    int64_t n = below(TENSORS + 1), length = 0, position = 0, fixed = 1, block = one_of(blocks, 6);
    randomize(file, FILE_MOST);
    for (int64_t i = 0; i < n; i++) {
        tensor *t = &tensors[i];
        draw_tensor(t, true, turn % 50 == 49 ? 16 : 6);
        wanted[i] = malloc((size_t)t->memory_nbytes);
        CHECK(wanted[i] != NULL, "memory");
        if (position + t->nbytes > FILE_MOST) {
            free(t->memory);
            free(wanted[i]);
            n = i;
            break;
        }
        const int64_t head[] = {position,
                                t->nbytes,
                                t->itemsize,
                                t->ndim,
                                (int64_t)(uintptr_t)t->first,
                                (int64_t)(uintptr_t)t->memory,
                                t->memory_nbytes};
        length = append(ops, length, head, 7);
        length = append(ops, length, t->dense, t->ndim);
        length = append(ops, length, t->offset, t->ndim);
        length = append(ops, length, t->box, t->ndim);
        length = append(ops, length, t->stride, t->ndim);
        index[i + 1] = length;
        memset(t->memory, FILL, (size_t)t->memory_nbytes);
        each(t, file + position, give_to);
        memcpy(wanted[i], t->memory, (size_t)t->memory_nbytes);
        fixed = position + t->nbytes > fixed ? position + t->nbytes : fixed;
        position += below(2) ? t->nbytes + below(20) : below(t->nbytes);
    }
    for (int64_t b = 0; b * block < fixed; b++)
        crcs[b] = reference_crc(0, file + b * block, fixed - b * block < block ? fixed - b * block : block);
    ck_scatter scatter = {.fixed = fixed,
                          .block = block,
                          .block_crcs = crcs,
                          .n_blocks = ck_pieces(0, fixed, block),
                          .ops = ops,
                          .index = index,
                          .ops_length = length,
                          .n_ops = n};
    ck_error error = {.kind = CK_OK};
    for (int from_file = 0; from_file < 2; from_file++) {
        for (int64_t i = 0; i < n; i++)
            memset(tensors[i].memory, FILL, (size_t)tensors[i].memory_nbytes);
        if (from_file) {
            CHECK(ck_write_run(fd, file, fixed, 0, 1 + below(fixed), 3, &error), "%s", error.text);
            const int64_t ranges[] = {0, fixed};
            ck_load load = {.fd = fd,
                            .scatter = scatter,
                            .ranges = ranges,
                            .n_ranges = 1,
                            .request_nbytes = block * (1 + below(fixed / block + 1)),
                            .threads = 3};
            CHECK(ck_load_prepare(&load, &error), "%s", error.text);
            CHECK(ck_load_run(&load, &error) == -1 && error.kind == CK_OK, "turn %d: %s", turn, error.text);
            ck_load_free(&load);
        } else {
            CHECK(ck_scatter_prepare(&scatter, &error), "%s", error.text);
            int64_t cut = below(fixed / block + 1) * block; /* two ranges, which may cut an element */
            CHECK(ck_scatter_run(&scatter, file, 0, cut, 2) == -1, "turn %d", turn);
            CHECK(ck_scatter_run(&scatter, file + cut, cut, fixed - cut, 2) == -1, "turn %d", turn);
            int64_t flipped = below(fixed);
            unsigned char bit = (unsigned char)(1 << below(8));
            file[flipped] ^= bit;
            CHECK(ck_scatter_run(&scatter, file, 0, fixed, 3) == flipped / block, "turn %d", turn);
            file[flipped] ^= bit;
            ck_scatter_free(&scatter);
        }
        for (int64_t i = 0; i < n; i++)
            CHECK(memcmp(tensors[i].memory, wanted[i], (size_t)tensors[i].memory_nbytes) == 0, "turn %d",
                  turn);
    }
    for (int64_t i = 0; i < n; i++) {
        free(tensors[i].memory);
        free(wanted[i]);
    }
}

/* ---- the window that ranks share ---- */

#define SHARE_RANKS 4
#define SHARE_REQUESTS 40
#define SHARE_FILE (SHARE_REQUESTS * CK_ALIGNMENT)

typedef struct {
    ck_window window;
    const unsigned char *file;
    const int64_t *requests, *readers;              /* of all ranks */
    int64_t consumers[SHARE_REQUESTS][SHARE_RANKS]; /* of each request, n of them */
    int64_t n_consumers[SHARE_REQUESTS];
    int64_t n;
} share_plan;

typedef struct {
    const share_plan *plan;
    ck_window window; /* with this rank */
    unsigned char *memory;
} share_rank;

static void *read_requests(void *argument) {
    const share_rank *self = argument;
    const share_plan *plan = self->plan;
    for (int64_t i = 0; i < plan->n; i++) {
        if (plan->readers[i] != self->window.rank)
            continue;
        int64_t before = i - self->window.slots;
        while (ck_share_wait(&self->window, i, before < 0 ? NULL : plan->consumers[before],
                             before < 0 ? 0 : plan->n_consumers[before], 1000000) != CK_READY) {
        }
        const int64_t *row = plan->requests + 3 * i;
        memcpy(ck_window_slot(&self->window, i), plan->file + row[1], (size_t)row[2]);
        ck_share_publish(&self->window, i);
    }
    return NULL;
}

static bool consumes(const share_plan *plan, int64_t request, int64_t rank) {
    for (int64_t i = 0; i < plan->n_consumers[request]; i++)
        if (plan->consumers[request][i] == rank)
            return true;
    return false;
}

static void *take_requests(void *argument) {
    const share_rank *self = argument;
    const share_plan *plan = self->plan;
    static const uint32_t crcs[SHARE_FILE / CK_ALIGNMENT]; /* nothing is verified here: they may be wrong */
    int64_t rows[3 * SHARE_REQUESTS], n = 0;
    for (int64_t i = 0; i < plan->n; i++)
        if (consumes(plan, i, self->window.rank))
            memcpy(rows + 3 * n++, plan->requests + 3 * i, 3 * sizeof *rows);
    const int64_t address = (int64_t)(uintptr_t)self->memory;
    const int64_t op[] = {0, SHARE_FILE, 1, 1, address, address, SHARE_FILE, SHARE_FILE, 0, SHARE_FILE, 1};
    const int64_t index[] = {0, 11};
    ck_consume consume = {.window = self->window,
                          .scatter = {.fixed = SHARE_FILE,
                                      .block = CK_ALIGNMENT,
                                      .block_crcs = crcs,
                                      .n_blocks = SHARE_FILE / CK_ALIGNMENT,
                                      .ops = op,
                                      .index = index,
                                      .ops_length = 11,
                                      .n_ops = 1},
                          .requests = rows,
                          .n_requests = n,
                          .nanoseconds = 1000000,
                          .threads = 2};
    ck_error error = {.kind = CK_OK};
    CHECK(ck_consume_prepare(&consume, &error), "%s", error.text);
    ck_outcome outcome;
    while ((outcome = ck_consume_run(&consume)) == CK_LATE) {
    }
    ck_consume_free(&consume);
    CHECK(outcome == CK_READY, "rank %d", (int)self->window.rank);
    return NULL;
}

/* Ranks as threads: each gets the requests that it wants, whole, and nothing else. */
static void check_share(int turn) {
    static unsigned char file[SHARE_FILE], memory[SHARE_RANKS][SHARE_FILE];
    int64_t requests[3 * SHARE_REQUESTS], readers[SHARE_REQUESTS], position = 0;
    share_plan plan = {.file = file, .requests = requests, .readers = readers, .n = below(20)};
    int64_t ranks = 1 + below(SHARE_RANKS), slots = 1 + below(4), most = 1 + below(3);
    int64_t nbytes = ck_window_control(slots, ranks) + slots * most * CK_ALIGNMENT;
    unsigned char *base = aligned_alloc(CK_ALIGNMENT, (size_t)nbytes);
    CHECK(base != NULL, "memory");
    memset(base, 0, (size_t)nbytes);
    randomize(file, SHARE_FILE);
    memset(memory, FILL, sizeof memory);
    plan.window = (ck_window){base, nbytes, slots, most * CK_ALIGNMENT, ranks, 0};
    for (int64_t i = 0; i < plan.n; i++) {
        int64_t length = (1 + below(most)) * CK_ALIGNMENT;
        position += below(2) * CK_ALIGNMENT;
        if (position + length > SHARE_FILE) {
            plan.n = i;
            break;
        }
        const int64_t row[] = {i, position, length};
        append(requests, 3 * i, row, 3);
        position += length;
        for (int64_t rank = 0; rank < ranks; rank++)
            if (below(2))
                plan.consumers[i][plan.n_consumers[i]++] = rank;
        readers[i] = below(ranks);
    }
    share_rank all[SHARE_RANKS];
    pthread_t threads[2 * SHARE_RANKS];
    for (int64_t rank = 0; rank < ranks; rank++) {
        all[rank] = (share_rank){&plan, plan.window, memory[rank]};
        all[rank].window.rank = rank;
        CHECK(pthread_create(&threads[2 * rank], NULL, read_requests, &all[rank]) == 0, "a thread");
        CHECK(pthread_create(&threads[2 * rank + 1], NULL, take_requests, &all[rank]) == 0, "a thread");
    }
    for (int64_t i = 0; i < 2 * ranks; i++)
        pthread_join(threads[i], NULL);
    for (int64_t rank = 0; rank < ranks; rank++) {
        int64_t at = 0;
        for (int64_t i = 0; i < plan.n; i++) {
            const int64_t *row = requests + 3 * i;
            if (!consumes(&plan, i, rank))
                continue;
            CHECK(filled(memory[rank] + at, row[1] - at), "turn %d, before request %d", turn, (int)i);
            CHECK(memcmp(memory[rank] + row[1], file + row[1], (size_t)row[2]) == 0, "turn %d, request %d",
                  turn, (int)i);
            at = row[1] + row[2];
        }
        CHECK(filled(memory[rank] + at, SHARE_FILE - at), "turn %d, after the last request", turn);
    }
    CHECK(ck_share_wait(&plan.window, plan.n + slots, &(int64_t){0}, 1, 0) == CK_LATE, "turn %d", turn);
    ck_share_stop(&plan.window);
    CHECK(ck_share_wait(&plan.window, plan.n + slots, &(int64_t){0}, 1, 1000000000) == CK_STOPPED, "turn %d",
          turn);
    free(base);
}

static void check_window_bounds(void) {
    unsigned char *base = aligned_alloc(CK_ALIGNMENT, 4 * CK_ALIGNMENT);
    CHECK(base != NULL, "memory");
    const ck_window good = {base, 4 * CK_ALIGNMENT, 3, CK_ALIGNMENT, 2, 1};
    ck_error error = {.kind = CK_OK};
    CHECK(ck_window_check(&good, &error), "%s", error.text);
    ck_window bad[] = {good, good, good, good, good, good, good, good, good, good, good, good, good};
    bad[0].base = NULL;
    bad[1].base = base + 64;
    bad[2].nbytes = 4 * CK_ALIGNMENT - 1;
    bad[3].nbytes = INT64_MIN;
    bad[4].slots = 0;
    bad[5].slots = 4;
    bad[6].slots = INT64_MAX;
    bad[7].slot_nbytes = 0;
    bad[8].slot_nbytes = CK_ALIGNMENT + 1;
    bad[9].slot_nbytes = INT64_MAX / CK_ALIGNMENT * CK_ALIGNMENT;
    bad[10].ranks = INT64_MAX;
    bad[11].rank = 2;
    bad[12].rank = -1;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(!ck_window_check(&bad[i], &error), "window %d", (int)i);
    const int64_t ranks[] = {0, 2};
    CHECK(!ck_share_check(&good, 0, ranks, 2, &error), "rank 2 of 2");
    CHECK(!ck_share_check(&good, -1, ranks, 1, &error), "request -1");
    CHECK(!ck_share_check(&good, INT64_MAX, ranks, 1, &error), "the last request");
    free(base);
}

int main(int n, char **arguments) {
    int turns = n > 1 ? atoi(arguments[1]) : 200;
    ck_init();
    check_crc();
    for (int turn = 0; turn < turns; turn++)
        check_pack(turn);
    FILE *file = tmpfile();
    CHECK(file != NULL, "a temporary file");
    for (int turn = 0; turn < turns; turn++)
        check_scatter(turn, fileno(file));
    fclose(file);
    check_window_bounds();
    for (int turn = 0; turn < turns; turn++)
        check_share(turn);
    printf("all checks passed\n");
    return 0;
}

/* The window: shared memory through which the ranks of a node hand each other what one of them has read.
 *
 * Request n lies in slot n % slots while it is handed over. Its reader waits until every consumer of the
 * request that had the slot before is done with it, reads, and publishes; each consumer waits for that,
 * scatters, and is done. A slot's words hold the number of the request plus one, so they only ever grow, and
 * memory that is all zero is a window that nobody has used. Every wait ends: when it is over, when somebody
 * stopped the window, or when the time that it was given has passed; what then is to be done is its caller's
 * business. */
#include "ckptengine.h"

#include <stdio.h>
#include <time.h>

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "words in shared memory must not need a lock of this process");

#define HEAD_WORDS 8 /* the first one tells that the window was stopped */
#define SHORTEST_NAP 20000
#define LONGEST_NAP 500000 /* nanoseconds; a request takes a few times as long to read */

typedef _Atomic(uint64_t) ck_word;

bool ck_window_check(const ck_window *window, ck_error *error) {
    if (window->ranks < 1 || window->ranks > CK_MAX_RANKS || window->rank < 0 ||
        window->rank >= window->ranks || window->slots < 1 || window->slots > CK_MAX_SLOTS)
        return ck_value_error(error,
                              "window: rank %lld of %lld and %lld slots; there may be %d ranks and %d slots",
                              (long long)window->rank, (long long)window->ranks, (long long)window->slots,
                              CK_MAX_RANKS, CK_MAX_SLOTS);
    if ((uintptr_t)window->base % CK_ALIGNMENT != 0 || window->base == NULL || window->slot_nbytes <= 0 ||
        window->slot_nbytes % CK_ALIGNMENT != 0)
        return ck_value_error(error, "window: its address and slot_nbytes %lld must be multiples of %d",
                              (long long)window->slot_nbytes, CK_ALIGNMENT);
    int64_t control = ck_window_control(window->slots, window->ranks);
    if (window->nbytes < control || window->slot_nbytes > (window->nbytes - control) / window->slots)
        return ck_value_error(
            error, "window: %lld bytes are too few for %lld slots of %lld bytes and the words of %lld ranks",
            (long long)window->nbytes, (long long)window->slots, (long long)window->slot_nbytes,
            (long long)window->ranks);
    return true;
}

int64_t ck_window_control(int64_t slots, int64_t ranks) {
    int64_t words = HEAD_WORDS + slots + slots * ranks;
    return (words * (int64_t)sizeof(ck_word) + CK_ALIGNMENT - 1) / CK_ALIGNMENT * CK_ALIGNMENT;
}

static ck_word *words(const ck_window *window) {
    return (ck_word *)(void *)window->base;
}

static ck_word *filled_word(const ck_window *window, int64_t request) {
    return words(window) + HEAD_WORDS + request % window->slots;
}

static ck_word *done_word(const ck_window *window, int64_t request, int64_t rank) {
    return words(window) + HEAD_WORDS + window->slots + request % window->slots * window->ranks + rank;
}

unsigned char *ck_window_slot(const ck_window *window, int64_t request) {
    return window->base + ck_window_control(window->slots, window->ranks) +
           request % window->slots * window->slot_nbytes;
}

/* ---- waiting ---- */

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Waits until a word has come to a value, by naps: a waiter must not take a core from those it waits for. */
static ck_outcome wait_for(const ck_window *window, ck_word *word, uint64_t value, int64_t deadline) {
    long nap = SHORTEST_NAP;
    for (;;) {
        if (atomic_load_explicit(word, memory_order_acquire) >= value)
            return CK_READY;
        if (atomic_load_explicit(words(window), memory_order_relaxed) != 0)
            return CK_STOPPED;
        if (now() >= deadline)
            return CK_LATE;
        struct timespec time = {.tv_nsec = nap};
        nanosleep(&time, NULL);
        nap = 2 * nap < LONGEST_NAP ? 2 * nap : LONGEST_NAP;
    }
}

/* ---- the reader's side ---- */

bool ck_share_check(const ck_window *window, int64_t request, const int64_t *ranks, int64_t n,
                    ck_error *error) {
    if (!ck_window_check(window, error))
        return false;
    if (request < 0 || request == INT64_MAX)
        return ck_value_error(error, "request %lld", (long long)request);
    for (int64_t i = 0; i < n; i++)
        if (ranks[i] < 0 || ranks[i] >= window->ranks)
            return ck_value_error(error, "consumer %lld: rank %lld of %lld", (long long)i,
                                  (long long)ranks[i], (long long)window->ranks);
    return true;
}

ck_outcome ck_share_wait(const ck_window *window, int64_t request, const int64_t *consumers, int64_t n,
                         int64_t nanoseconds) {
    if (atomic_load_explicit(words(window), memory_order_relaxed) != 0)
        return CK_STOPPED;
    int64_t before = request - window->slots, deadline = now() + nanoseconds;
    if (before < 0)
        return CK_READY;
    /* one that nobody wants is over when it has been published: words must not fall */
    ck_outcome outcome = wait_for(window, filled_word(window, before), (uint64_t)before + 1, deadline);
    for (int64_t i = 0; i < n && outcome == CK_READY; i++)
        outcome = wait_for(window, done_word(window, before, consumers[i]), (uint64_t)before + 1, deadline);
    return outcome;
}

void ck_share_publish(const ck_window *window, int64_t request) {
    atomic_store_explicit(filled_word(window, request), (uint64_t)request + 1, memory_order_release);
}

void ck_share_stop(const ck_window *window) {
    atomic_store(words(window), 1);
}

/* ---- the consumers' side ---- */

bool ck_consume_prepare(ck_consume *consume, ck_error *error) {
    consume->scatter.reach = NULL;
    if (!ck_window_check(&consume->window, error) || !ck_scatter_prepare(&consume->scatter, error))
        return false;
    int64_t before = -1;
    for (int64_t i = 0; i < consume->n_requests; i++) {
        const int64_t *row = consume->requests + 3 * i;
        char what[40];
        snprintf(what, sizeof what, "request %lld", (long long)row[0]);
        bool good = ck_range_check(&consume->scatter, row[1], row[2], what, error);
        if (good && (row[0] <= before || row[0] == INT64_MAX || row[2] > consume->window.slot_nbytes))
            good =
                ck_value_error(error, "%s is out of order, or its %lld bytes do not fit into a slot of %lld",
                               what, (long long)row[2], (long long)consume->window.slot_nbytes);
        if (!good) {
            ck_consume_free(consume);
            return false;
        }
        before = row[0];
    }
    return true;
}

void ck_consume_free(ck_consume *consume) {
    ck_scatter_free(&consume->scatter);
}

typedef struct {
    const ck_consume *consume;
    int64_t deadline;
    atomic_int outcome; /* the first that is not CK_READY */
} consume_job;

static bool consume_request(void *context, int64_t unit, int worker) {
    (void)worker;
    consume_job *job = context;
    const ck_window *window = &job->consume->window;
    const int64_t *row = job->consume->requests + 3 * unit;
    ck_word *done = done_word(window, row[0], window->rank);
    uint64_t number = (uint64_t)row[0] + 1;
    if (atomic_load_explicit(done, memory_order_relaxed) >= number)
        return true; /* in a call before, which was late for another one */
    ck_outcome outcome = wait_for(window, filled_word(window, row[0]), number, job->deadline);
    if (outcome != CK_READY) {
        int expected = CK_READY;
        atomic_compare_exchange_strong(&job->outcome, &expected, (int)outcome);
        return false;
    }
    ck_scatter_verified(&job->consume->scatter, ck_window_slot(window, row[0]), row[1], row[2]);
    atomic_store_explicit(done, number, memory_order_release);
    return true;
}

ck_outcome ck_consume_run(const ck_consume *consume) {
    consume_job job = {.consume = consume, .deadline = now() + consume->nanoseconds};
    atomic_init(&job.outcome, CK_READY);
    ck_parallel(consume->n_requests, consume->threads, consume_request, &job);
    return (ck_outcome)atomic_load(&job.outcome);
}

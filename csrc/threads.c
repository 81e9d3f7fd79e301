/* A parallel loop over numbered units: threads made for one call, pulling from one atomic counter. */
#include "ckptengine.h"

#include <pthread.h>
#include <signal.h>

typedef struct {
    atomic_int_fast64_t next;
    atomic_bool stop;
    int64_t units;
    ck_body body;
    void *context;
} ck_loop;

typedef struct {
    ck_loop *loop;
    int worker;
} ck_worker;

static void pull(ck_loop *loop, int worker) {
    while (!atomic_load_explicit(&loop->stop, memory_order_relaxed)) {
        int64_t unit = atomic_fetch_add_explicit(&loop->next, 1, memory_order_relaxed);
        if (unit >= loop->units)
            return;
        if (!loop->body(loop->context, unit, worker))
            atomic_store_explicit(&loop->stop, true, memory_order_relaxed);
    }
}

static void *start(void *argument) {
    ck_worker *self = argument;
    pull(self->loop, self->worker);
    return NULL;
}

void ck_parallel(int64_t units, int threads, ck_body body, void *context) {
    ck_loop shared = {.units = units, .body = body, .context = context};
    atomic_init(&shared.next, 0);
    atomic_init(&shared.stop, false);
    if (threads > CK_MAX_THREADS)
        threads = CK_MAX_THREADS;
    if (threads > units)
        threads = (int)units;
    pthread_t handles[CK_MAX_THREADS];
    ck_worker workers[CK_MAX_THREADS];
    int started = 0;
    if (threads > 1) {
        /* Workers inherit a full mask: the program's signal handlers run on its own threads only. */
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        for (int i = 1; i < threads; i++) {
            workers[started] = (ck_worker){&shared, i};
            if (pthread_create(&handles[started], NULL, start, &workers[started]) != 0)
                break; /* the work is pulled, so fewer threads do it all */
            started++;
        }
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    pull(&shared, 0);
    for (int i = 0; i < started; i++)
        pthread_join(handles[i], NULL);
}

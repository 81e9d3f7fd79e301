/* Large positioned reads and writes, several in flight, straight from and into given memory. They suit files
 * opened with O_DIRECT, whose offsets, lengths and addresses must be multiples of the device's block, and all
 * others. */
#include "ckptengine.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_PAGE (2 << 20)
#define POOL_SLOTS 16
#define POOL_MOST (16 << 20) /* larger buffers go back to the system */

static bool system_error(ck_error *error, int number, const char *verb, int64_t nbytes, int64_t position,
                         int fd) {
    snprintf(error->text, sizeof error->text, "%s %lld bytes at position %lld of file descriptor %d: %s",
             verb, (long long)nbytes, (long long)position, fd, strerror(number));
    error->number = number;
    error->kind = CK_SYSTEM;
    return false;
}

/* ---- the pool of read buffers ---- */

/* Buffers kept between calls, because touching new memory costs more than reading into it. Slots are
 * exchanged atomically: there is no lock that a fork could leave taken. */
typedef struct {
    int64_t size;
    unsigned char *bytes;
} ck_buffer;

static _Atomic(ck_buffer *) pool[POOL_SLOTS];

static void buffer_free(ck_buffer *buffer) {
    free(buffer->bytes);
    free(buffer);
}

static void buffer_return(ck_buffer *buffer) {
    if (buffer->size <= POOL_MOST)
        for (int i = 0; i < POOL_SLOTS; i++) {
            ck_buffer *expected = NULL;
            if (atomic_compare_exchange_strong(&pool[i], &expected, buffer))
                return;
        }
    buffer_free(buffer);
}

static ck_buffer *buffer_new(int64_t size) {
    ck_buffer *made = malloc(sizeof *made);
    if (made == NULL)
        return NULL;
    size_t alignment = size >= HUGE_PAGE ? HUGE_PAGE : CK_ALIGNMENT;
    void *bytes;
    if (posix_memalign(&bytes, alignment, (size_t)size) != 0) {
        free(made);
        return NULL;
    }
    if (size >= HUGE_PAGE)
        madvise(bytes, (size_t)size,
                MADV_HUGEPAGE); /* fewer pages for the kernel to pin; refusal does no harm */
    *made = (ck_buffer){size, bytes};
    return made;
}

static ck_buffer *buffer_take(int64_t size) {
    for (int i = 0; i < POOL_SLOTS; i++) {
        ck_buffer *found = atomic_exchange(&pool[i], NULL);
        if (found == NULL)
            continue;
        if (found->size >= size)
            return found;
        buffer_free(found); /* the requests have grown: small ones would fill the pool */
    }
    return buffer_new(size);
}

/* ---- load ---- */

static int64_t aligned(int64_t nbytes) {
    return (nbytes + CK_ALIGNMENT - 1) / CK_ALIGNMENT * CK_ALIGNMENT;
}

bool ck_load_prepare(ck_load *load, ck_error *error) {
    load->requests = NULL;
    load->n_requests = 0;
    if (!ck_scatter_prepare(&load->scatter, error))
        return false;
    if (load->request_nbytes <= 0 || load->request_nbytes % load->scatter.block != 0) {
        ck_scatter_free(&load->scatter);
        return ck_value_error(error, "request_nbytes %lld is not a positive multiple of block_nbytes %lld",
                              (long long)load->request_nbytes, (long long)load->scatter.block);
    }
    int64_t before = 0, count = 0;
    for (int64_t number = 0; number < load->n_ranges; number++) {
        int64_t position = load->ranges[2 * number], nbytes = load->ranges[2 * number + 1];
        char what[40];
        snprintf(what, sizeof what, "range %lld", (long long)number);
        if (!ck_range_check(&load->scatter, position, nbytes, what, error)) {
            ck_scatter_free(&load->scatter);
            return false;
        }
        if (position < before) {
            ck_scatter_free(&load->scatter);
            return ck_value_error(
                error, "range %lld: position %lld overlaps the range before it, or is out of order",
                (long long)number, (long long)position);
        }
        before = position + nbytes;
        count += ck_pieces(0, nbytes, load->request_nbytes);
    }
    if (count == 0)
        return true;
    load->requests = malloc((size_t)count * sizeof *load->requests);
    if (load->requests == NULL) {
        ck_scatter_free(&load->scatter);
        return ck_memory_error(error);
    }
    for (int64_t number = 0; number < load->n_ranges; number++) {
        int64_t position = load->ranges[2 * number], end = position + load->ranges[2 * number + 1];
        for (; position < end; position += load->request_nbytes) {
            int64_t part = end - position < load->request_nbytes ? end - position : load->request_nbytes;
            load->requests[load->n_requests++] = (ck_request){position, part};
        }
    }
    return true;
}

void ck_load_free(ck_load *load) {
    ck_scatter_free(&load->scatter);
    free(load->requests);
    load->requests = NULL;
}

/* Reads until nbytes or the end of the file; returns the bytes read, or -1 with errno. */
static int64_t read_fully(int fd, unsigned char *bytes, int64_t nbytes, int64_t position) {
    int64_t done = 0;
    while (done < nbytes) {
        /* a short read is continued from an aligned place, because O_DIRECT would refuse any other */
        int64_t from = done / CK_ALIGNMENT * CK_ALIGNMENT;
        ssize_t got = pread(fd, bytes + from, (size_t)(nbytes - from), (off_t)(position + from));
        ck_count(CK_READ_CALLS, 1);
        ck_count(CK_READ, got > 0 ? got : 0);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -1;
        }
        if (from + got <= done)
            break;
        done = from + got;
    }
    return done;
}

typedef struct {
    ck_load *load;
    ck_error *error;
    atomic_flag failed;          /* set by the first that fills in error */
    atomic_int_fast64_t damaged; /* the lowest found, or INT64_MAX */
    int64_t buffer_nbytes;
    ck_buffer *buffers[CK_MAX_THREADS];
} load_job;

static bool load_request(void *context, int64_t unit, int worker) {
    load_job *job = context;
    const ck_load *load = job->load;
    ck_request request = load->requests[unit];
    if (job->buffers[worker] == NULL)
        job->buffers[worker] = buffer_take(job->buffer_nbytes);
    if (job->buffers[worker] == NULL) {
        if (!atomic_flag_test_and_set(&job->failed))
            ck_memory_error(job->error);
        return false;
    }
    unsigned char *bytes = job->buffers[worker]->bytes;
    /* the last block of a file may end anywhere, and O_DIRECT wants whole ones: the read stops at the end */
    int64_t got = read_fully(load->fd, bytes, aligned(request.nbytes), request.position);
    if (got > request.nbytes)
        got = request.nbytes;
    if (got < 0) {
        int number = errno;
        if (!atomic_flag_test_and_set(&job->failed))
            system_error(job->error, number, "reading", request.nbytes, request.position, load->fd);
        return false;
    }
    int64_t complete = got == request.nbytes ? got : got / load->scatter.block * load->scatter.block;
    int64_t damaged = ck_scatter_range(&load->scatter, bytes, request.position, complete);
    if (damaged < 0 && complete < request.nbytes)
        damaged = (request.position + complete) / load->scatter.block;
    if (damaged < 0)
        return true;
    /* requests are pulled in order and finished, so the lowest damaged block is always found */
    int_fast64_t lowest = atomic_load(&job->damaged);
    while (damaged < lowest && !atomic_compare_exchange_weak(&job->damaged, &lowest, damaged)) {
    }
    return false;
}

int64_t ck_load_run(ck_load *load, ck_error *error) {
    load_job job = {.load = load, .error = error, .failed = ATOMIC_FLAG_INIT};
    atomic_init(&job.damaged, INT64_MAX);
    for (int64_t i = 0; i < load->n_requests; i++)
        if (load->requests[i].nbytes > job.buffer_nbytes)
            job.buffer_nbytes = aligned(load->requests[i].nbytes);
    ck_parallel(load->n_requests, load->threads, load_request, &job);
    for (int i = 0; i < CK_MAX_THREADS; i++)
        if (job.buffers[i] != NULL)
            buffer_return(job.buffers[i]);
    int64_t damaged = atomic_load(&job.damaged);
    return damaged == INT64_MAX ? -1 : damaged;
}

/* ---- write ---- */

typedef struct {
    int fd;
    const unsigned char *bytes;
    int64_t nbytes, position, request_nbytes;
    ck_error *error;
    atomic_flag failed;
} write_job;

/* Returns 0 or errno; *done tells how far it came. */
static int write_fully(int fd, const unsigned char *bytes, int64_t nbytes, int64_t position, int64_t *done) {
    int64_t from = *done = 0;
    while (*done < nbytes) {
        ssize_t put = pwrite(fd, bytes + from, (size_t)(nbytes - from), (off_t)(position + from));
        ck_count(CK_WRITE_CALLS, 1);
        ck_count(CK_WRITTEN, put > 0 ? put : 0);
        if (put < 0) {
            if (errno == EINTR)
                continue;
            /* after a short write O_DIRECT may refuse to go on from where it stopped */
            if (errno == EINVAL && from % CK_ALIGNMENT != 0) {
                from -= from % CK_ALIGNMENT;
                continue;
            }
            return errno;
        }
        if (from + put <= *done)
            return EIO; /* no progress */
        from = *done = from + put;
    }
    return 0;
}

static bool write_request(void *context, int64_t unit, int worker) {
    (void)worker;
    write_job *job = context;
    int64_t at = unit * job->request_nbytes, left = job->nbytes - at, done;
    int64_t part = left < job->request_nbytes ? left : job->request_nbytes;
    int number = write_fully(job->fd, job->bytes + at, part, job->position + at, &done);
    if (number == 0)
        return true;
    if (!atomic_flag_test_and_set(&job->failed))
        system_error(job->error, number, "writing", part - done, job->position + at + done, job->fd);
    return false;
}

bool ck_write_run(int fd, const unsigned char *bytes, int64_t nbytes, int64_t position,
                  int64_t request_nbytes, int depth, ck_error *error) {
    write_job job = {.fd = fd,
                     .bytes = bytes,
                     .nbytes = nbytes,
                     .position = position,
                     .request_nbytes = request_nbytes,
                     .error = error,
                     .failed = ATOMIC_FLAG_INIT};
    ck_parallel(ck_pieces(0, nbytes, request_nbytes), depth, write_request, &job);
    return error->kind == CK_OK;
}

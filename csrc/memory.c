/* Memory for images: in huge pages where the system has them, mapped by several threads, unknown to forked
 * processes. */
#include "ckptengine.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define UNIT (16 << 20)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

typedef struct {
    unsigned char *bytes;
    int64_t nbytes;
    long page;
    atomic_int failed; /* errno of the first that failed */
} populate_job;

static bool populate_unit(void *context, int64_t unit, int worker) {
    (void)worker;
    populate_job *job = context;
    unsigned char *bytes = job->bytes + unit * UNIT;
    int64_t nbytes = job->nbytes - unit * UNIT < UNIT ? job->nbytes - unit * UNIT : UNIT;
    if (madvise(bytes, (size_t)nbytes, MADV_POPULATE_WRITE) == 0)
        return true;
    if (errno != EINVAL) {
        atomic_store(&job->failed, errno);
        return false;
    }
    for (int64_t at = 0; at < nbytes; at += job->page) /* an older kernel maps a page when it is written to */
        *(volatile unsigned char *)(bytes + at) = 0;
    return true;
}

static bool failed(ck_error *error, int number, int64_t nbytes) {
    snprintf(error->text, sizeof error->text, "mapping %lld bytes of memory: %s", (long long)nbytes,
             strerror(number));
    error->number = number;
    error->kind = CK_SYSTEM;
    return false;
}

bool ck_memory_map(int64_t nbytes, int fd, int threads, unsigned char **address, ck_error *error) {
    /* Room first, from which an aligned piece is taken: pages are of one size only where addresses are
     * aligned. */
    size_t room = (size_t)nbytes + CK_HUGE_PAGE;
    unsigned char *mapped = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        return failed(error, errno, nbytes);
    size_t before = (size_t)(-(uintptr_t)mapped % CK_HUGE_PAGE), after = room - before - (size_t)nbytes;
    if (before > 0)
        munmap(mapped, before);
    unsigned char *bytes = mapped + before;
    if (after > 0)
        munmap(bytes + nbytes, after);
    int flags = MAP_FIXED | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    if (mmap(bytes, (size_t)nbytes, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED) {
        int number = errno;
        ck_memory_unmap(bytes, nbytes);
        return failed(error, number, nbytes);
    }
    /* Both may be refused, and are no more than an advantage: fewer and larger pieces for the disk to fetch,
     * and no copy of a page that is written to after a fork. */
    madvise(bytes, (size_t)nbytes, MADV_HUGEPAGE);
    madvise(bytes, (size_t)nbytes, MADV_DONTFORK);
    populate_job job = {.bytes = bytes, .nbytes = nbytes, .page = sysconf(_SC_PAGESIZE)};
    atomic_init(&job.failed, 0);
    ck_parallel(ck_pieces(0, nbytes, UNIT), threads, populate_unit, &job);
    int number = atomic_load(&job.failed);
    if (number != 0) {
        ck_memory_unmap(bytes, nbytes);
        return failed(error, number, nbytes);
    }
    *address = bytes;
    return true;
}

void ck_memory_unmap(unsigned char *address, int64_t nbytes) {
    munmap(address, (size_t)nbytes);
}

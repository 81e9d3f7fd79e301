/* What the copy path has done in this process: counts say whether it does more than it must, on any machine.
 */
#include "ckptengine.h"

static atomic_int_fast64_t counters[CK_COUNTERS];

void ck_count(ck_counter counter, int64_t n) {
    atomic_fetch_add_explicit(&counters[counter], n, memory_order_relaxed);
}

int64_t ck_counted(ck_counter counter) {
    return atomic_load_explicit(&counters[counter], memory_order_relaxed);
}

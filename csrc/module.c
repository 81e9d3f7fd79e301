/* The Python face of the C copy path: arguments in, one place that raises, the GIL released in between. */
#include <Python.h>

#include "ckptengine.h"

/* ---- arguments ---- */

/* A table whose items have the given size; the caller releases it. */
static int get_table(PyObject *object, const char *name, Py_ssize_t itemsize, int writable, Py_buffer *view) {
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0)) != 0)
        return 0;
    if (view->itemsize != itemsize || view->len % itemsize != 0 ||
        (view->len > 0 && (uintptr_t)view->buf % (uintptr_t)itemsize != 0)) {
        PyErr_Format(PyExc_ValueError,
                     "%s must be a C-contiguous, aligned table of %zd-byte integers, not of %zd-byte ones",
                     name, itemsize, view->itemsize);
        PyBuffer_Release(view);
        return 0;
    }
    return 1;
}

typedef struct {
    PyObject *object;
    const char *name;
    Py_ssize_t itemsize;
    int writable;
} table;

static void release_tables(Py_buffer *views, int n) {
    while (n-- > 0)
        PyBuffer_Release(&views[n]);
}

static int get_tables(const table *tables, int n, Py_buffer *views) {
    for (int i = 0; i < n; i++)
        if (!get_table(tables[i].object, tables[i].name, tables[i].itemsize, tables[i].writable, &views[i])) {
            release_tables(views, i);
            return 0;
        }
    return 1;
}

static int64_t items(const Py_buffer *view) {
    return view->len / view->itemsize;
}

static int check_threads(const char *name, long long threads) {
    if (threads >= 1 && threads <= CK_MAX_THREADS)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s must be 1 to %d, not %lld", name, CK_MAX_THREADS, threads);
    return 0;
}

static int check_index(const Py_buffer *index) {
    if (index->len > 0)
        return 1;
    PyErr_SetString(PyExc_ValueError, "index must have one entry more than there are ops");
    return 0;
}

static const ck_variant *get_variant(const char *name) {
    const ck_variant *variant = ck_variant_named(name);
    if (variant == NULL) {
        const ck_variant *const *list;
        char names[128] = "";
        int n = ck_variants(&list);
        size_t used = 0;
        for (int i = 0; i < n; i++)
            used +=
                (size_t)PyOS_snprintf(names + used, sizeof names - used, i ? ", %s" : "%s", list[i]->name);
        PyErr_Format(PyExc_ValueError, "CRC variant '%s' is not usable on this CPU; these are: %s", name,
                     names);
    }
    return variant;
}

/* The one place that turns the core's errors into exceptions. */
static PyObject *raise_error(const ck_error *error) {
    PyObject *arguments;
    switch (error->kind) {
    case CK_MEMORY:
        return PyErr_NoMemory();
    case CK_SYSTEM:
        arguments = Py_BuildValue("(is)", error->number, error->text);
        if (arguments != NULL) {
            PyErr_SetObject(PyExc_OSError, arguments);
            Py_DECREF(arguments);
        }
        return NULL;
    default:
        PyErr_SetString(PyExc_ValueError, error->text);
        return NULL;
    }
}

/* ---- CRC32 ---- */

static PyObject *native_variants(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    const ck_variant *const *list;
    int n = ck_variants(&list);
    PyObject *names = PyTuple_New(n);
    for (int i = 0; names != NULL && i < n; i++) {
        PyObject *name = PyUnicode_FromString(list[i]->name);
        if (name == NULL || PyTuple_SetItem(names, i, name) != 0)
            Py_CLEAR(names);
    }
    return names;
}

static int check_crc(const char *name, long long value) {
    if (value >= 0 && value <= 0xFFFFFFFFLL)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s must be a CRC32 of 0 to 2**32 - 1, not %lld", name, value);
    return 0;
}

static PyObject *native_crc32(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"data", "value", "variant", NULL};
    PyObject *object;
    long long value = 0;
    const char *name = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|Lz:crc32", names, &object, &value, &name))
        return NULL;
    const ck_variant *variant = get_variant(name);
    if (variant == NULL || !check_crc("value", value))
        return NULL;
    Py_buffer data;
    if (PyObject_GetBuffer(object, &data, PyBUF_C_CONTIGUOUS) != 0)
        return NULL;
    uint32_t state = ~(uint32_t)value;
    if (data.len > 0) {
        Py_BEGIN_ALLOW_THREADS state = variant->update(state, data.buf, (size_t)data.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong((uint32_t)~state);
}

static PyObject *native_crc32_combine(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"first", "second", "second_nbytes", NULL};
    long long first, second, nbytes;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LLL:crc32_combine", names, &first, &second, &nbytes))
        return NULL;
    if (!check_crc("first", first) || !check_crc("second", second))
        return NULL;
    if (nbytes < 0) {
        PyErr_Format(PyExc_ValueError, "second_nbytes must not be negative, and is %lld", nbytes);
        return NULL;
    }
    return PyLong_FromUnsignedLong(ck_combine((uint32_t)first, (uint32_t)second, ck_shift((uint64_t)nbytes)));
}

/* ---- pack ---- */

static PyObject *native_pack(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"image_address", "image_nbytes", "ops",     "index",
                            "block_nbytes",  "crcs",         "threads", "variant",
                            "begin",         "end",          NULL};
    long long address, nbytes, block, threads, begin = 0, end = -1;
    PyObject *ops, *index, *crcs;
    const char *name = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LLOOLOL|zLL:pack", names, &address, &nbytes, &ops,
                                     &index, &block, &crcs, &threads, &name, &begin, &end))
        return NULL;
    const ck_variant *variant = get_variant(name);
    if (variant == NULL || !check_threads("threads", threads))
        return NULL;
    if (address < 0 || nbytes < 0 || block <= 0) {
        PyErr_Format(PyExc_ValueError,
                     "image_address %lld and image_nbytes %lld must not be negative, block_nbytes %lld must "
                     "be positive",
                     address, nbytes, block);
        return NULL;
    }
    enum { OPS, INDEX, CRCS, N };
    const table tables[N] = {{ops, "ops", 8, 0}, {index, "index", 8, 0}, {crcs, "crcs", 4, 1}};
    Py_buffer views[N];
    if (!get_tables(tables, N, views))
        return NULL;
    if (!check_index(&views[INDEX])) {
        release_tables(views, N);
        return NULL;
    }
    ck_pack pack = {.image = (unsigned char *)(uintptr_t)address,
                    .image_nbytes = nbytes,
                    .begin = begin,
                    .end = end < 0 ? nbytes : end,
                    .ops = views[OPS].buf,
                    .index = views[INDEX].buf,
                    .ops_length = items(&views[OPS]),
                    .n_ops = items(&views[INDEX]) - 1,
                    .block = block,
                    .crcs = views[CRCS].buf,
                    .n_crcs = items(&views[CRCS]),
                    .threads = (int)threads,
                    .variant = variant};
    ck_error error = {.kind = CK_OK};
    int ready = ck_pack_prepare(&pack, &error);
    if (ready) {
        Py_BEGIN_ALLOW_THREADS ck_pack_run(&pack);
        ck_pack_free(&pack);
        Py_END_ALLOW_THREADS
    }
    release_tables(views, N);
    if (!ready)
        return raise_error(&error);
    Py_RETURN_NONE;
}

/* ---- seal ---- */

static PyObject *native_seal(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"image_address", "fixed_nbytes", "extents",    "block_nbytes",
                            "piece_crcs",    "entry_crcs",   "block_crcs", "threads",
                            "begin",         "end",          NULL};
    long long address, fixed, block, threads, begin = 0, end = -1;
    PyObject *extents, *pieces, *entries, *blocks;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LLOLOOOL|LL:seal", names, &address, &fixed, &extents,
                                     &block, &pieces, &entries, &blocks, &threads, &begin, &end))
        return NULL;
    if (!check_threads("threads", threads))
        return NULL;
    if (address < 0) {
        PyErr_Format(PyExc_ValueError, "image_address %lld must not be negative", address);
        return NULL;
    }
    enum { EXTENTS, PIECES, ENTRIES, BLOCKS, N };
    const table tables[N] = {{extents, "extents", 8, 0},
                             {pieces, "piece_crcs", 4, 0},
                             {entries, "entry_crcs", 4, 1},
                             {blocks, "block_crcs", 4, 1}};
    Py_buffer views[N];
    if (!get_tables(tables, N, views))
        return NULL;
    if (items(&views[EXTENTS]) % 4 != 0) {
        release_tables(views, N);
        PyErr_SetString(PyExc_ValueError, "extents must have rows of 4");
        return NULL;
    }
    ck_seal seal = {.image = (unsigned char *)(uintptr_t)address,
                    .fixed = fixed,
                    .begin = begin,
                    .end = end < 0 ? fixed : end,
                    .extents = views[EXTENTS].buf,
                    .n_extents = items(&views[EXTENTS]) / 4,
                    .block = block,
                    .piece_crcs = views[PIECES].buf,
                    .n_pieces = items(&views[PIECES]),
                    .entry_crcs = views[ENTRIES].buf,
                    .n_entries = items(&views[ENTRIES]),
                    .block_crcs = views[BLOCKS].buf,
                    .n_blocks = items(&views[BLOCKS]),
                    .threads = (int)threads};
    ck_error error = {.kind = CK_OK};
    int ready = ck_seal_prepare(&seal, &error);
    if (ready) {
        Py_BEGIN_ALLOW_THREADS ck_seal_run(&seal);
        Py_END_ALLOW_THREADS
    }
    release_tables(views, N);
    if (!ready)
        return raise_error(&error);
    Py_RETURN_NONE;
}

/* ---- scatter and load ---- */

static PyObject *native_scatter(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"address",    "position", "nbytes", "fixed_nbytes", "block_nbytes",
                            "block_crcs", "ops",      "index",  "threads",      NULL};
    long long address, position, nbytes, fixed, block, threads;
    PyObject *crcs, *ops, *index;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LLLLLOOOL:scatter", names, &address, &position, &nbytes,
                                     &fixed, &block, &crcs, &ops, &index, &threads))
        return NULL;
    if (!check_threads("threads", threads))
        return NULL;
    if (address < 0 || (address == 0 && nbytes != 0)) {
        PyErr_Format(PyExc_ValueError, "address is %lld", address);
        return NULL;
    }
    enum { CRCS, OPS, INDEX, N };
    const table tables[N] = {{crcs, "block_crcs", 4, 0}, {ops, "ops", 8, 0}, {index, "index", 8, 0}};
    Py_buffer views[N];
    if (!get_tables(tables, N, views))
        return NULL;
    if (!check_index(&views[INDEX])) {
        release_tables(views, N);
        return NULL;
    }
    ck_scatter scatter = {.fixed = fixed,
                          .block = block,
                          .block_crcs = views[CRCS].buf,
                          .n_blocks = items(&views[CRCS]),
                          .ops = views[OPS].buf,
                          .index = views[INDEX].buf,
                          .ops_length = items(&views[OPS]),
                          .n_ops = items(&views[INDEX]) - 1};
    ck_error error = {.kind = CK_OK};
    int ready = ck_scatter_prepare(&scatter, &error);
    int64_t damaged = -1;
    if (ready) {
        ready = ck_range_check(&scatter, position, nbytes, "range", &error);
        if (ready) {
            Py_BEGIN_ALLOW_THREADS damaged = ck_scatter_run(
                &scatter, (const unsigned char *)(uintptr_t)address, position, nbytes, (int)threads);
            Py_END_ALLOW_THREADS
        }
        ck_scatter_free(&scatter);
    }
    release_tables(views, N);
    if (!ready)
        return raise_error(&error);
    return PyLong_FromLongLong(damaged);
}

static PyObject *native_load(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"fd",  "fixed_nbytes", "block_nbytes",   "block_crcs", "ranges",
                            "ops", "index",        "request_nbytes", "threads",    NULL};
    int fd;
    long long fixed, block, request, threads;
    PyObject *crcs, *ranges, *ops, *index;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iLLOOOOLL:load", names, &fd, &fixed, &block, &crcs,
                                     &ranges, &ops, &index, &request, &threads))
        return NULL;
    if (!check_threads("threads", threads))
        return NULL;
    enum { CRCS, RANGES, OPS, INDEX, N };
    const table tables[N] = {
        {crcs, "block_crcs", 4, 0}, {ranges, "ranges", 8, 0}, {ops, "ops", 8, 0}, {index, "index", 8, 0}};
    Py_buffer views[N];
    if (!get_tables(tables, N, views))
        return NULL;
    if (!check_index(&views[INDEX]) || items(&views[RANGES]) % 2 != 0) {
        release_tables(views, N);
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "ranges must have rows of 2");
        return NULL;
    }
    ck_load load = {.fd = fd,
                    .scatter = {.fixed = fixed,
                                .block = block,
                                .block_crcs = views[CRCS].buf,
                                .n_blocks = items(&views[CRCS]),
                                .ops = views[OPS].buf,
                                .index = views[INDEX].buf,
                                .ops_length = items(&views[OPS]),
                                .n_ops = items(&views[INDEX]) - 1},
                    .ranges = views[RANGES].buf,
                    .n_ranges = items(&views[RANGES]) / 2,
                    .request_nbytes = request,
                    .threads = (int)threads};
    ck_error error = {.kind = CK_OK};
    int64_t damaged = -1;
    if (ck_load_prepare(&load, &error)) {
        Py_BEGIN_ALLOW_THREADS damaged = ck_load_run(&load, &error);
        ck_load_free(&load);
        Py_END_ALLOW_THREADS
    }
    release_tables(views, N);
    if (error.kind != CK_OK)
        return raise_error(&error);
    return PyLong_FromLongLong(damaged);
}

/* ---- the window ---- */

/* A table of address, nbytes, slots, slot_nbytes, ranks, rank. */
static int get_window(PyObject *object, ck_window *window) {
    Py_buffer view;
    if (!get_table(object, "window", 8, 0, &view))
        return 0;
    int complete = items(&view) == 6;
    if (complete) {
        const int64_t *row = view.buf;
        *window = (ck_window){.base = (unsigned char *)(uintptr_t)row[0],
                              .nbytes = row[1],
                              .slots = row[2],
                              .slot_nbytes = row[3],
                              .ranks = row[4],
                              .rank = row[5]};
    } else {
        PyErr_SetString(PyExc_ValueError,
                        "window must hold address, nbytes, slots, slot_nbytes, ranks and rank");
    }
    PyBuffer_Release(&view);
    return complete;
}

static int get_nanoseconds(double seconds, int64_t *nanoseconds) {
    if (!(seconds >= 0 && seconds <= 3600)) {
        PyErr_SetString(PyExc_ValueError, "seconds must be 0 to 3600");
        return 0;
    }
    *nanoseconds = (int64_t)(seconds * 1e9);
    return 1;
}

static PyObject *native_window_control(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"slots", "ranks", NULL};
    long long slots, ranks;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LL:window_control", names, &slots, &ranks))
        return NULL;
    if (slots < 1 || slots > CK_MAX_SLOTS || ranks < 1 || ranks > CK_MAX_RANKS) {
        PyErr_Format(PyExc_ValueError, "%lld slots of at most %d, %lld ranks of at most %d", slots,
                     CK_MAX_SLOTS, ranks, CK_MAX_RANKS);
        return NULL;
    }
    return PyLong_FromLongLong(ck_window_control(slots, ranks));
}

static PyObject *native_share_wait(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"window", "request", "consumers", "seconds", NULL};
    long long request;
    double seconds;
    PyObject *object, *consumers;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OLOd:share_wait", names, &object, &request, &consumers,
                                     &seconds))
        return NULL;
    ck_window window;
    int64_t nanoseconds;
    Py_buffer view;
    if (!get_window(object, &window) || !get_nanoseconds(seconds, &nanoseconds) ||
        !get_table(consumers, "consumers", 8, 0, &view))
        return NULL;
    ck_error error = {.kind = CK_OK};
    ck_outcome outcome = CK_STOPPED;
    if (ck_share_check(&window, request, view.buf, items(&view), &error)) {
        Py_BEGIN_ALLOW_THREADS outcome = ck_share_wait(&window, request, view.buf, items(&view), nanoseconds);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    if (error.kind != CK_OK)
        return raise_error(&error);
    return PyLong_FromLong(outcome);
}

static PyObject *native_share_publish(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"window", "request", NULL};
    long long request;
    PyObject *object;
    ck_window window;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OL:share_publish", names, &object, &request) ||
        !get_window(object, &window))
        return NULL;
    ck_error error = {.kind = CK_OK};
    if (!ck_share_check(&window, request, NULL, 0, &error))
        return raise_error(&error);
    ck_share_publish(&window, request);
    Py_RETURN_NONE;
}

static PyObject *native_share_stop(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"window", NULL};
    PyObject *object;
    ck_window window;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:share_stop", names, &object) ||
        !get_window(object, &window))
        return NULL;
    ck_error error = {.kind = CK_OK};
    if (!ck_window_check(&window, &error))
        return raise_error(&error);
    ck_share_stop(&window);
    Py_RETURN_NONE;
}

static PyObject *native_share_consume(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"window", "requests", "fixed_nbytes", "block_nbytes", "block_crcs",
                            "ops",    "index",    "threads",      "seconds",      NULL};
    long long fixed, block, threads;
    double seconds;
    PyObject *object, *requests, *crcs, *ops, *index;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOLLOOOLd:share_consume", names, &object, &requests,
                                     &fixed, &block, &crcs, &ops, &index, &threads, &seconds))
        return NULL;
    ck_window window;
    int64_t nanoseconds;
    if (!check_threads("threads", threads) || !get_window(object, &window) ||
        !get_nanoseconds(seconds, &nanoseconds))
        return NULL;
    enum { REQUESTS, CRCS, OPS, INDEX, N };
    const table tables[N] = {
        {requests, "requests", 8, 0}, {crcs, "block_crcs", 4, 0}, {ops, "ops", 8, 0}, {index, "index", 8, 0}};
    Py_buffer views[N];
    if (!get_tables(tables, N, views))
        return NULL;
    if (!check_index(&views[INDEX]) || items(&views[REQUESTS]) % 3 != 0) {
        release_tables(views, N);
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "requests must have rows of 3");
        return NULL;
    }
    ck_consume consume = {.window = window,
                          .scatter = {.fixed = fixed,
                                      .block = block,
                                      .block_crcs = views[CRCS].buf,
                                      .n_blocks = items(&views[CRCS]),
                                      .ops = views[OPS].buf,
                                      .index = views[INDEX].buf,
                                      .ops_length = items(&views[OPS]),
                                      .n_ops = items(&views[INDEX]) - 1},
                          .requests = views[REQUESTS].buf,
                          .n_requests = items(&views[REQUESTS]) / 3,
                          .nanoseconds = nanoseconds,
                          .threads = (int)threads};
    ck_error error = {.kind = CK_OK};
    ck_outcome outcome = CK_STOPPED;
    int ready = ck_consume_prepare(&consume, &error);
    if (ready) {
        Py_BEGIN_ALLOW_THREADS outcome = ck_consume_run(&consume);
        ck_consume_free(&consume);
        Py_END_ALLOW_THREADS
    }
    release_tables(views, N);
    if (!ready)
        return raise_error(&error);
    return PyLong_FromLong(outcome);
}

/* ---- write ---- */

static PyObject *native_write(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"fd", "address", "nbytes", "position", "request_nbytes", "depth", NULL};
    int fd;
    long long address, nbytes, position, request, depth, end;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iLLLLL:write", names, &fd, &address, &nbytes, &position,
                                     &request, &depth))
        return NULL;
    if (!check_threads("depth", depth))
        return NULL;
    if (address < 0 || nbytes < 0 || position < 0 || request <= 0 || (address == 0 && nbytes > 0) ||
        __builtin_add_overflow(position, nbytes, &end)) {
        PyErr_Format(PyExc_ValueError,
                     "address %lld, nbytes %lld and position %lld must not be negative, request_nbytes %lld "
                     "must be positive",
                     address, nbytes, position, request);
        return NULL;
    }
    ck_error error = {.kind = CK_OK};
    Py_BEGIN_ALLOW_THREADS ck_write_run(fd, (const unsigned char *)(uintptr_t)address, nbytes, position,
                                        request, (int)depth, &error);
    Py_END_ALLOW_THREADS if (error.kind != CK_OK) return raise_error(&error);
    Py_RETURN_NONE;
}

/* ---- memory ---- */

static int check_memory(long long nbytes) {
    if (nbytes > 0 && nbytes % CK_HUGE_PAGE == 0 && nbytes < (1LL << 62))
        return 1;
    PyErr_Format(PyExc_ValueError, "nbytes must be a positive multiple of %d, not %lld", CK_HUGE_PAGE,
                 nbytes);
    return 0;
}

static PyObject *native_memory_map(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"nbytes", "threads", NULL};
    long long nbytes, threads;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LL:memory_map", names, &nbytes, &threads))
        return NULL;
    if (!check_memory(nbytes) || !check_threads("threads", threads))
        return NULL;
    ck_error error = {.kind = CK_OK};
    unsigned char *address = NULL;
    Py_BEGIN_ALLOW_THREADS ck_memory_map(nbytes, (int)threads, &address, &error);
    Py_END_ALLOW_THREADS if (error.kind != CK_OK) return raise_error(&error);
    return PyLong_FromVoidPtr(address);
}

static PyObject *native_memory_unmap(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"address", "nbytes", NULL};
    long long address, nbytes;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LL:memory_unmap", names, &address, &nbytes))
        return NULL;
    if (!check_memory(nbytes))
        return NULL;
    if (address <= 0 || address % CK_HUGE_PAGE != 0) {
        PyErr_Format(PyExc_ValueError, "address %lld is none that memory_map gave", address);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS ck_memory_unmap((unsigned char *)(uintptr_t)address, nbytes);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

/* ---- counters ---- */

static PyObject *native_counters(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return Py_BuildValue("(LLLLL)", (long long)ck_counted(CK_COPIED), (long long)ck_counted(CK_WRITTEN),
                         (long long)ck_counted(CK_WRITE_CALLS), (long long)ck_counted(CK_READ),
                         (long long)ck_counted(CK_READ_CALLS));
}

/* ---- module ---- */

#define METHOD(name, flags, text) {#name, (PyCFunction)(void (*)(void))native_##name, flags, text}

static PyMethodDef methods[] = {
    METHOD(variants, METH_NOARGS, "Names of the CRC32 variants that this CPU can run, best first."),
    METHOD(counters, METH_NOARGS, "Bytes copied, bytes written, writes, bytes read, reads of this process."),
    METHOD(memory_map, METH_VARARGS | METH_KEYWORDS, "Maps memory in huge pages, every page of it at once."),
    METHOD(memory_unmap, METH_VARARGS | METH_KEYWORDS, "Gives memory of memory_map back."),
    METHOD(crc32, METH_VARARGS | METH_KEYWORDS, "zlib's CRC32 of data, continued from value."),
    METHOD(crc32_combine, METH_VARARGS | METH_KEYWORDS,
           "The CRC32 of two byte strings, one after the other."),
    METHOD(pack, METH_VARARGS | METH_KEYWORDS, "Copies tensors into the image and checksums its pieces."),
    METHOD(seal, METH_VARARGS | METH_KEYWORDS, "Combines the pieces' CRCs to those of entries and blocks."),
    METHOD(scatter, METH_VARARGS | METH_KEYWORDS,
           "Verifies file bytes in memory and scatters them into tensors."),
    METHOD(load, METH_VARARGS | METH_KEYWORDS, "Reads ranges of a file, verifies and scatters them."),
    METHOD(window_control, METH_VARARGS | METH_KEYWORDS, "Bytes of a window before its slots."),
    METHOD(share_wait, METH_VARARGS | METH_KEYWORDS, "Waits until the slot of a request is free."),
    METHOD(share_publish, METH_VARARGS | METH_KEYWORDS, "Hands a request to its consumers."),
    METHOD(share_stop, METH_VARARGS | METH_KEYWORDS, "Ends all waits for a window on all ranks."),
    METHOD(share_consume, METH_VARARGS | METH_KEYWORDS, "Scatters requests from the window as they come."),
    METHOD(write, METH_VARARGS | METH_KEYWORDS, "Writes memory to a file, several requests in flight."),
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module) {
    ck_init();
    if (PyModule_AddIntConstant(module, "READY", CK_READY) != 0 ||
        PyModule_AddIntConstant(module, "STOPPED", CK_STOPPED) != 0 ||
        PyModule_AddIntConstant(module, "LATE", CK_LATE) != 0)
        return -1;
    return PyModule_AddIntConstant(module, "BLOCK_ALIGNMENT", CK_ALIGNMENT);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "ckptengine._native", .m_doc = "The C copy path.",
    .m_size = 0,           .m_methods = methods,           .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) {
    return PyModuleDef_Init(&definition);
}

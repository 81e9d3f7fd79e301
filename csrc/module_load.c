/* The Python face of what a load does: scatter, load, and the window that the ranks of a node share. */
#include "module.h"

/* ---- scatter and load ---- */

PyObject *native_scatter(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"address",    "position", "nbytes", "fixed_nbytes", "block_nbytes",
                            "block_crcs", "ops",      "index",  "threads",      NULL};
    long long address, position, nbytes, fixed, block, threads;
    PyObject *crcs, *ops, *index;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LLLLLOOOL:scatter", names, &address, &position, &nbytes,
                                     &fixed, &block, &crcs, &ops, &index, &threads))
        return NULL;
    if (!ck_check_threads("threads", threads))
        return NULL;
    if (address < 0 || (address == 0 && nbytes != 0)) {
        PyErr_Format(PyExc_ValueError, "address is %lld", address);
        return NULL;
    }
    enum { CRCS, OPS, INDEX, N };
    const ck_table tables[N] = {
        {crcs, "block_crcs", 4, CK_OPTIONAL}, {ops, "ops", 8, CK_INPUT}, {index, "index", 8, CK_INPUT}};
    Py_buffer views[N];
    if (!ck_get_tables(tables, N, views))
        return NULL;
    if (!ck_check_index(&views[INDEX])) {
        ck_release_tables(views, N);
        return NULL;
    }
    ck_scatter scatter = {.fixed = fixed,
                          .block = block,
                          .unverified = crcs == Py_None,
                          .block_crcs = views[CRCS].buf,
                          .n_blocks = ck_items(&views[CRCS]),
                          .ops = views[OPS].buf,
                          .index = views[INDEX].buf,
                          .ops_length = ck_items(&views[OPS]),
                          .n_ops = ck_items(&views[INDEX]) - 1};
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
    ck_release_tables(views, N);
    if (!ready)
        return ck_raise_error(&error);
    return PyLong_FromLongLong(damaged);
}

PyObject *native_load(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"fd",  "fixed_nbytes", "block_nbytes",   "block_crcs", "ranges",
                            "ops", "index",        "request_nbytes", "threads",    NULL};
    int fd;
    long long fixed, block, request, threads;
    PyObject *crcs, *ranges, *ops, *index;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iLLOOOOLL:load", names, &fd, &fixed, &block, &crcs,
                                     &ranges, &ops, &index, &request, &threads))
        return NULL;
    if (!ck_check_threads("threads", threads))
        return NULL;
    enum { CRCS, RANGES, OPS, INDEX, N };
    const ck_table tables[N] = {{crcs, "block_crcs", 4, CK_OPTIONAL},
                                {ranges, "ranges", 8, CK_INPUT},
                                {ops, "ops", 8, CK_INPUT},
                                {index, "index", 8, CK_INPUT}};
    Py_buffer views[N];
    if (!ck_get_tables(tables, N, views))
        return NULL;
    if (!ck_check_index(&views[INDEX]) || ck_items(&views[RANGES]) % 2 != 0) {
        ck_release_tables(views, N);
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "ranges must have rows of 2");
        return NULL;
    }
    ck_load load = {.fd = fd,
                    .scatter = {.fixed = fixed,
                                .block = block,
                                .unverified = crcs == Py_None,
                                .block_crcs = views[CRCS].buf,
                                .n_blocks = ck_items(&views[CRCS]),
                                .ops = views[OPS].buf,
                                .index = views[INDEX].buf,
                                .ops_length = ck_items(&views[OPS]),
                                .n_ops = ck_items(&views[INDEX]) - 1},
                    .ranges = views[RANGES].buf,
                    .n_ranges = ck_items(&views[RANGES]) / 2,
                    .request_nbytes = request,
                    .threads = (int)threads};
    ck_error error = {.kind = CK_OK};
    int64_t damaged = -1;
    if (ck_load_prepare(&load, &error)) {
        Py_BEGIN_ALLOW_THREADS damaged = ck_load_run(&load, &error);
        ck_load_free(&load);
        Py_END_ALLOW_THREADS
    }
    ck_release_tables(views, N);
    if (error.kind != CK_OK)
        return ck_raise_error(&error);
    return PyLong_FromLongLong(damaged);
}

/* ---- the window ---- */

/* A table of address, nbytes, slots, slot_nbytes, ranks, rank. */
static int get_window(PyObject *object, ck_window *window) {
    Py_buffer view;
    if (!ck_get_table(object, "window", 8, 0, &view))
        return 0;
    int complete = ck_items(&view) == 6;
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

PyObject *native_window_control(PyObject *module, PyObject *args, PyObject *keywords) {
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

PyObject *native_share_wait(PyObject *module, PyObject *args, PyObject *keywords) {
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
        !ck_get_table(consumers, "consumers", 8, 0, &view))
        return NULL;
    ck_error error = {.kind = CK_OK};
    ck_outcome outcome = CK_STOPPED;
    if (ck_share_check(&window, request, view.buf, ck_items(&view), &error)) {
        Py_BEGIN_ALLOW_THREADS outcome =
            ck_share_wait(&window, request, view.buf, ck_items(&view), nanoseconds);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    if (error.kind != CK_OK)
        return ck_raise_error(&error);
    return PyLong_FromLong(outcome);
}

PyObject *native_share_publish(PyObject *module, PyObject *args, PyObject *keywords) {
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
        return ck_raise_error(&error);
    ck_share_publish(&window, request);
    Py_RETURN_NONE;
}

PyObject *native_share_stop(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"window", NULL};
    PyObject *object;
    ck_window window;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:share_stop", names, &object) ||
        !get_window(object, &window))
        return NULL;
    ck_error error = {.kind = CK_OK};
    if (!ck_window_check(&window, &error))
        return ck_raise_error(&error);
    ck_share_stop(&window);
    Py_RETURN_NONE;
}

PyObject *native_share_consume(PyObject *module, PyObject *args, PyObject *keywords) {
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
    if (!ck_check_threads("threads", threads) || !get_window(object, &window) ||
        !get_nanoseconds(seconds, &nanoseconds))
        return NULL;
    enum { REQUESTS, CRCS, OPS, INDEX, N };
    const ck_table tables[N] = {{requests, "requests", 8, CK_INPUT},
                                {crcs, "block_crcs", 4, CK_OPTIONAL},
                                {ops, "ops", 8, CK_INPUT},
                                {index, "index", 8, CK_INPUT}};
    Py_buffer views[N];
    if (!ck_get_tables(tables, N, views))
        return NULL;
    if (!ck_check_index(&views[INDEX]) || ck_items(&views[REQUESTS]) % 3 != 0) {
        ck_release_tables(views, N);
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "requests must have rows of 3");
        return NULL;
    }
    ck_consume consume = {.window = window,
                          .scatter = {.fixed = fixed,
                                      .block = block,
                                      .unverified = crcs == Py_None,
                                      .block_crcs = views[CRCS].buf,
                                      .n_blocks = ck_items(&views[CRCS]),
                                      .ops = views[OPS].buf,
                                      .index = views[INDEX].buf,
                                      .ops_length = ck_items(&views[OPS]),
                                      .n_ops = ck_items(&views[INDEX]) - 1},
                          .requests = views[REQUESTS].buf,
                          .n_requests = ck_items(&views[REQUESTS]) / 3,
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
    ck_release_tables(views, N);
    if (!ready)
        return ck_raise_error(&error);
    return PyLong_FromLong(outcome);
}

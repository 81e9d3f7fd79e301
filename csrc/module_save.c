/* The Python face of what a save does: pack, seal, write, and the memory for it. */
#include "module.h"

/* ---- pack ---- */

PyObject *native_pack(PyObject *module, PyObject *args, PyObject *keywords) {
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
    const ck_variant *variant = ck_get_variant(name);
    if (variant == NULL || !ck_check_threads("threads", threads))
        return NULL;
    if (address < 0 || nbytes < 0 || block <= 0) {
        PyErr_Format(PyExc_ValueError,
                     "image_address %lld and image_nbytes %lld must not be negative, block_nbytes %lld must "
                     "be positive",
                     address, nbytes, block);
        return NULL;
    }
    enum { OPS, INDEX, CRCS, N };
    const ck_table tables[N] = {
        {ops, "ops", 8, CK_INPUT}, {index, "index", 8, CK_INPUT}, {crcs, "crcs", 4, CK_OUTPUT}};
    Py_buffer views[N];
    if (!ck_get_tables(tables, N, views))
        return NULL;
    if (!ck_check_index(&views[INDEX])) {
        ck_release_tables(views, N);
        return NULL;
    }
    ck_pack pack = {.image = (unsigned char *)(uintptr_t)address,
                    .image_nbytes = nbytes,
                    .begin = begin,
                    .end = end < 0 ? nbytes : end,
                    .ops = views[OPS].buf,
                    .index = views[INDEX].buf,
                    .ops_length = ck_items(&views[OPS]),
                    .n_ops = ck_items(&views[INDEX]) - 1,
                    .block = block,
                    .crcs = views[CRCS].buf,
                    .n_crcs = ck_items(&views[CRCS]),
                    .threads = (int)threads,
                    .variant = variant};
    ck_error error = {.kind = CK_OK};
    int ready = ck_pack_prepare(&pack, &error);
    if (ready) {
        Py_BEGIN_ALLOW_THREADS ck_pack_run(&pack);
        ck_pack_free(&pack);
        Py_END_ALLOW_THREADS
    }
    ck_release_tables(views, N);
    if (!ready)
        return ck_raise_error(&error);
    Py_RETURN_NONE;
}

/* ---- seal ---- */

PyObject *native_seal(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"image_address", "fixed_nbytes", "extents",    "block_nbytes",
                            "piece_crcs",    "entry_crcs",   "block_crcs", "threads",
                            "begin",         "end",          NULL};
    long long address, fixed, block, threads, begin = 0, end = -1;
    PyObject *extents, *pieces, *entries, *blocks;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LLOLOOOL|LL:seal", names, &address, &fixed, &extents,
                                     &block, &pieces, &entries, &blocks, &threads, &begin, &end))
        return NULL;
    if (!ck_check_threads("threads", threads))
        return NULL;
    if (address < 0) {
        PyErr_Format(PyExc_ValueError, "image_address %lld must not be negative", address);
        return NULL;
    }
    enum { EXTENTS, PIECES, ENTRIES, BLOCKS, N };
    const ck_table tables[N] = {{extents, "extents", 8, CK_INPUT},
                                {pieces, "piece_crcs", 4, CK_INPUT},
                                {entries, "entry_crcs", 4, CK_OUTPUT},
                                {blocks, "block_crcs", 4, CK_OUTPUT}};
    Py_buffer views[N];
    if (!ck_get_tables(tables, N, views))
        return NULL;
    if (ck_items(&views[EXTENTS]) % 4 != 0) {
        ck_release_tables(views, N);
        PyErr_SetString(PyExc_ValueError, "extents must have rows of 4");
        return NULL;
    }
    ck_seal seal = {.image = (unsigned char *)(uintptr_t)address,
                    .fixed = fixed,
                    .begin = begin,
                    .end = end < 0 ? fixed : end,
                    .extents = views[EXTENTS].buf,
                    .n_extents = ck_items(&views[EXTENTS]) / 4,
                    .block = block,
                    .piece_crcs = views[PIECES].buf,
                    .n_pieces = ck_items(&views[PIECES]),
                    .entry_crcs = views[ENTRIES].buf,
                    .n_entries = ck_items(&views[ENTRIES]),
                    .block_crcs = views[BLOCKS].buf,
                    .n_blocks = ck_items(&views[BLOCKS]),
                    .threads = (int)threads};
    ck_error error = {.kind = CK_OK};
    int ready = ck_seal_prepare(&seal, &error);
    if (ready) {
        Py_BEGIN_ALLOW_THREADS ck_seal_run(&seal);
        Py_END_ALLOW_THREADS
    }
    ck_release_tables(views, N);
    if (!ready)
        return ck_raise_error(&error);
    Py_RETURN_NONE;
}

/* ---- write ---- */

PyObject *native_write(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"fd", "address", "nbytes", "position", "request_nbytes", "depth", NULL};
    int fd;
    long long address, nbytes, position, request, depth, end;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iLLLLL:write", names, &fd, &address, &nbytes, &position,
                                     &request, &depth))
        return NULL;
    if (!ck_check_threads("depth", depth))
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
    Py_END_ALLOW_THREADS if (error.kind != CK_OK) return ck_raise_error(&error);
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

PyObject *native_memory_map(PyObject *module, PyObject *args, PyObject *keywords) {
    (void)module;
    static char *names[] = {"nbytes", "threads", "fd", NULL};
    long long nbytes, threads;
    int fd = -1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "LL|i:memory_map", names, &nbytes, &threads, &fd))
        return NULL;
    if (!check_memory(nbytes) || !ck_check_threads("threads", threads))
        return NULL;
    ck_error error = {.kind = CK_OK};
    unsigned char *address = NULL;
    Py_BEGIN_ALLOW_THREADS ck_memory_map(nbytes, fd, (int)threads, &address, &error);
    Py_END_ALLOW_THREADS if (error.kind != CK_OK) return ck_raise_error(&error);
    return PyLong_FromVoidPtr(address);
}

PyObject *native_memory_unmap(PyObject *module, PyObject *args, PyObject *keywords) {
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

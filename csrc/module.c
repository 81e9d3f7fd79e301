/* The Python module: arguments in, one place that raises, the GIL released in between. */
#include "module.h"

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
    const ck_variant *variant = ck_get_variant(name);
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

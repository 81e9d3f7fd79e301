/* Arguments of the module's functions, and the one place that raises what the core reports. */
#include "module.h"

/* A table whose items have the given size; the caller releases it. */
int ck_get_table(PyObject *object, const char *name, Py_ssize_t itemsize, int writable, Py_buffer *view) {
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

void ck_release_tables(Py_buffer *views, int n) {
    while (n-- > 0)
        PyBuffer_Release(&views[n]);
}

int ck_get_tables(const ck_table *tables, int n, Py_buffer *views) {
    for (int i = 0; i < n; i++) {
        if (tables[i].access == CK_OPTIONAL && tables[i].object == Py_None) {
            views[i] = (Py_buffer){.itemsize = tables[i].itemsize};
            continue;
        }
        if (!ck_get_table(tables[i].object, tables[i].name, tables[i].itemsize, tables[i].access == CK_OUTPUT,
                          &views[i])) {
            ck_release_tables(views, i);
            return 0;
        }
    }
    return 1;
}

int64_t ck_items(const Py_buffer *view) {
    return view->len / view->itemsize;
}

int ck_check_threads(const char *name, long long threads) {
    if (threads >= 1 && threads <= CK_MAX_THREADS)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s must be 1 to %d, not %lld", name, CK_MAX_THREADS, threads);
    return 0;
}

int ck_check_index(const Py_buffer *index) {
    if (index->len > 0)
        return 1;
    PyErr_SetString(PyExc_ValueError, "index must have one entry more than there are ops");
    return 0;
}

const ck_variant *ck_get_variant(const char *name) {
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
PyObject *ck_raise_error(const ck_error *error) {
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

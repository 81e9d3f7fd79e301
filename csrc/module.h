/* What the files of the Python module share: its functions by job, and how they take their arguments. */
#ifndef CKPTENGINE_MODULE_H
#define CKPTENGINE_MODULE_H

#include <Python.h>

#include "ckptengine.h"

/* ---- arguments (arguments.c); what returns 0 or NULL has raised ---- */

typedef struct {
    PyObject *object;
    const char *name;
    Py_ssize_t itemsize;
    enum { CK_INPUT, CK_OUTPUT, CK_OPTIONAL } access; /* optional: read, and None stands for an empty one */
} ck_table;

int ck_get_table(PyObject *object, const char *name, Py_ssize_t itemsize, int writable, Py_buffer *view);
int ck_get_tables(const ck_table *tables, int n, Py_buffer *views); /* the caller releases them */
void ck_release_tables(Py_buffer *views, int n);
int64_t ck_items(const Py_buffer *view);
int ck_check_threads(const char *name, long long threads);
int ck_check_index(const Py_buffer *index);
const ck_variant *ck_get_variant(const char *name);
PyObject *ck_raise_error(const ck_error *error); /* returns NULL */

/* ---- functions (module_save.c, module_load.c) ---- */

#define CK_METHOD(name) PyObject *native_##name(PyObject *module, PyObject *args, PyObject *keywords)

CK_METHOD(pack);
CK_METHOD(seal);
CK_METHOD(write);
CK_METHOD(memory_map);
CK_METHOD(memory_unmap);
CK_METHOD(scatter);
CK_METHOD(load);
CK_METHOD(window_control);
CK_METHOD(share_wait);
CK_METHOD(share_publish);
CK_METHOD(share_stop);
CK_METHOD(share_consume);

#endif

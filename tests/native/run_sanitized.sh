#!/usr/bin/env bash
# Builds the extension under the address and undefined-behaviour sanitizers and runs the tests of this folder with
# it. PYTHON chooses the interpreter; further arguments go to pytest. Exits with 77 where gcc has no sanitizers.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

asan=$(gcc -print-file-name=libasan.so)
ubsan=$(gcc -print-file-name=libubsan.so)
if [ ! -e "$asan" ] || [ ! -e "$ubsan" ]; then
    echo "gcc has no libasan or libubsan here" >&2
    exit 77
fi
make --no-print-directory -s -C "$root/csrc" sanitized CC=gcc PYTHON="$python" OUT="$out"

# Leaks are not looked for: the interpreter itself leaves memory behind when it ends.
env LD_PRELOAD="$asan $ubsan" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    PYTHONMALLOC=malloc \
    CKPTENGINE_NATIVE_BUILD="$out/_native.abi3.so" \
    "$python" -m pytest -q -p no:cacheprovider --rootdir="$root" "$here" "$@"

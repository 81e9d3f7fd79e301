#!/usr/bin/env bash
# run.sh [FOLDER]: build the extension where it is, run the tests of this folder on the accelerator, then the benchmark.
# It needs torch, numpy, ml_dtypes, setuptools, pytest and a C compiler, and no network: see docs/gpu.md. Each part has
# a time limit, nine minutes in all. FOLDER (gpu-results) gets results.json and results.txt. Without an accelerator it
# says so and ends well; CKPTENGINE_GPU_PRETEND=1 has it go on, on a pretended one.
set -u
cd "$(dirname "$0")/../.." || exit 1
out=${1:-gpu-results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
python=${PYTHON:-python3}
text=$out/results.txt
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
: > "$text"

say() { echo "$*" | tee -a "$text"; }

# Wheels that were brought along, such as numcodecs' or pytest's, go to a folder of their own.
if compgen -G "wheels/*.whl" > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$out/site" wheels/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$out/site
fi

"$python" -c 'import torch; print(torch.accelerator.is_available())' > "$out/here" || { say "torch can't be imported"; exit 1; }
if [ "$(cat "$out/here")" != True ] && [ -z "${CKPTENGINE_GPU_PRETEND:-}" ]; then
  say "no accelerator is here: nothing was run (CKPTENGINE_GPU_PRETEND=1 runs it on a pretended one)"
  echo '{"accelerator": null}' > "$out/results.json"
  exit 0
fi

"$python" -c 'import numcodecs.zstd' 2> /dev/null || {
  say "numcodecs is not here: the system's libzstd takes its place (tests/gpu/stand_in)"
  export PYTHONPATH=$PWD/tests/gpu/stand_in:$PYTHONPATH
}
"$python" -c 'import ckptengine._native' 2> /dev/null || {
  say "building the extension"
  timeout 90 "$python" -c 'from setuptools import setup; setup()' build_ext --inplace > "$out/build.log" 2>&1 || {
    tail -20 "$out/build.log"
    say "the extension could not be built: $out/build.log"
    exit 1
  }
}

failed=0
if "$python" -c 'import pytest' 2> /dev/null; then
  timeout -s INT -k 15 "${CKPTENGINE_GPU_TEST_SECONDS:-210}" "$python" -m pytest -m "not sanitize" -q -rfEs -p no:cacheprovider --confcutdir=tests/gpu \
    -W ignore::pytest.PytestConfigWarning --junitxml "$out/tests.xml" \
    tests/gpu/test_{copies,restores,offloaded,fence}.py > "$out/tests.log" 2>&1  # what takes long comes last
  status=$?
  { [ $status = 124 ] || [ $status = 137 ]; } && say "the tests did not end in time: what they had done is in $out/tests.log"
  [ $status = 0 ] || failed=1
  grep -E "^(FAILED|ERROR|SKIPPED)|passed|failed" "$out/tests.log" | tee -a "$text"
else
  status=-1
  failed=1
  say "pytest is not here, nor a wheel of it in wheels/: no test was run"
fi

# Errors of memory in what the engine gives to the device, where CUDA's tool is here: the tests of the copies alone.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
if [ -n "$sanitizer" ] && [ $status -ge 0 ]; then
  timeout -k 5 "${CKPTENGINE_GPU_SANITIZER_SECONDS:-45}" "$sanitizer" --tool memcheck --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -x -p no:cacheprovider --confcutdir=tests/gpu -k "float32 or parts_of_tensors or moved_to_the_cpu" \
    tests/gpu/test_copies.py tests/gpu/test_restores.py > "$out/sanitizer.log" 2>&1
  case $? in
    0) say "compute-sanitizer: no errors" ;;
    124 | 137) say "compute-sanitizer did not end in time: $out/sanitizer.log" ;;
    *) failed=1; say "compute-sanitizer found errors, or a test failed under it: $out/sanitizer.log" ;;
  esac
else
  say "compute-sanitizer is not here: not run"
fi

# A pretended device's figures only show that there are figures.
[ "$(cat "$out/here")" = True ] && sizes="1 10 40" || sizes=0.01
# -k: a Checkpointer takes SIGTERM as the wish to save before the end, which a device that hangs would never let come.
timeout -k 5 "${CKPTENGINE_GPU_BENCH_SECONDS:-165}" "$python" -m benchmarks.gpu --folder "$out" --json "$out/figures.json" \
  --seconds "${CKPTENGINE_GPU_BENCH_BEGIN_SECONDS:-125}" --gigabytes ${CKPTENGINE_GPU_GIGABYTES:-$sizes} > "$out/figures.log" 2>&1 || {
  failed=1
  say "the benchmark did not end well: $out/figures.log"
}
tee -a "$text" < "$out/figures.log"

"$python" - "$out" "$status" << 'END'
import json, sys
from pathlib import Path
from xml.etree import ElementTree

out, status = Path(sys.argv[1]), int(sys.argv[2])
result = {"accelerator": (out / "here").read_text().strip() == "True", "tests_exit": status, "tests": [], "figures": None}
if (out / "tests.xml").exists():
    cases = ElementTree.parse(out / "tests.xml").iter("testcase")
    for case in (case for case in cases if case.get("name")):  # what a time limit has cut off has none
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        result["tests"].append({"name": case.get("name"), "result": min(kinds, default="passed"), "seconds": float(case.get("time"))})
if (out / "figures.json").exists():
    result["figures"] = json.loads((out / "figures.json").read_text())
(out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
END
say "written: $out/results.json, $text"
exit $failed

"""The builds beside the package's own: sanitizers, emulated AVX-512, aarch64."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

pytestmark = pytest.mark.sanitize


def make(target: str, out: Path) -> str:
    command = ["make", "-s", "-C", str(ROOT / "csrc"), target, f"OUT={out}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all checks passed" in result.stdout
    return result.stdout


def test_the_core_works_without_python(tmp_path: Path):
    assert "variant portable" in make("check", tmp_path)


def test_the_core_works_on_aarch64(tmp_path: Path):
    for tool in ("aarch64-linux-gnu-gcc", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    printed = make("check-aarch64", tmp_path)
    for variant in ("pmull", "armcrc", "portable"):
        assert f"variant {variant}" in printed


def test_the_path_for_avx512_works_where_it_is_emulated(tmp_path: Path):
    from native_tables import native

    if "pclmul" not in native.variants():
        pytest.skip("the emulation needs a CPU with PCLMULQDQ")
    assert "variant vpclmul512" in make("check-avx512", tmp_path)


def test_no_data_race_is_found_in_the_core(tmp_path: Path):
    probe = subprocess.run(["gcc", "-print-file-name=libtsan.so"], capture_output=True, text=True)
    if not Path(probe.stdout.strip()).is_absolute():
        pytest.skip("gcc has no thread sanitizer here")
    make("check-threads", tmp_path)


@pytest.mark.timeout(900)
def test_the_extension_runs_clean_under_the_sanitizers():
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(
        ["bash", str(HERE / "run_sanitized.sh")], env=environment, capture_output=True, text=True, timeout=800
    )
    if result.returncode == 77:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr

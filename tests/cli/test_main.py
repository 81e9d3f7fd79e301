import subprocess
import sys
from pathlib import Path

import pytest


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_click_or_rich_the_command_says_what_to_install(missing: str) -> None:
    done = python(f"import sys; sys.modules[{missing!r}] = None; from ckptengine.cli import main; main()")
    assert done.returncode == 2
    assert "pip install '.[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_installed_command_documents_its_exit_codes() -> None:
    command = Path(sys.executable).parent / "ckptengine"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "Exit codes" in done.stdout
    for name in ("ls", "show", "verify"):
        assert name in done.stdout


def test_the_command_imports_no_framework() -> None:
    program = (
        "import sys; import ckptengine.cli.app; "
        "print([name for name in ('torch', 'zarr', 'mindspore', 'fsspec') if name in sys.modules])"
    )
    assert python(program).stdout.strip() == "[]"

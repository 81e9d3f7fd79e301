"""What the figures were measured on."""

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("torch", "numpy", "safetensors", "torch_checkpointing", "tensorstore", "zarr", "ckptengine")


def facts(folder: Path) -> dict[str, object]:
    """Return CPU, cores, memory, kernel, file system of a folder, and versions."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "file_system": file_system(folder),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def cpu_model() -> str:
    """Return the CPU's name, as the kernel knows it, and what it calls its family and model."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    family = f"family {fields['cpu family']}, model {fields['model']}" if "cpu family" in fields else ""
    return ", ".join(part for part in (fields.get("model name", platform.machine()), family) if part)


def file_system(folder: Path) -> str:
    """Return the type of the file system that a folder lies on."""
    folder, best = folder.resolve(), (0, "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind = line.split()[:3]
        if folder.is_relative_to(mount):
            best = max(best, (len(mount), kind))
    return best[1]


def version(package: str) -> str | None:
    """Return the installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

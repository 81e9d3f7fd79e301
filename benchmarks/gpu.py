"""The accelerator's figures: what a save costs a training there, beside the pinned copy and other systems.

`python -m benchmarks.gpu --folder DISK --json FILE` measures on the accelerator. With none, on the CPU:
its figures say nothing then, but that the benchmark works. It is bounded: a size that does not fit into the memory, the
disk or the time is named, and left out.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ckptengine as ce
from benchmarks.disk import drop_cache
from benchmarks.systems import DcpAsyncCached, Safetensors, TorchCheckpointing, TorchSave

State = dict[str, torch.Tensor]

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

TENSOR_NBYTES = 32 << 20
SAVES = 4
"""Of each kind; the first one plans, and its memory is new, so it is not counted."""


class DcpPinned(DcpAsyncCached):
    """DCP's `async_save` with the stager that keeps its pinned memory."""

    name = "DCP async, cached pinned stager"

    def __init__(self, folder: Path, state: State) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(folder, state)
        self._stager.close()
        accelerated = DEVICE is not None and DEVICE.type != "cpu"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=accelerated,
                use_shared_memory=True,
                use_async_staging=accelerated,
                use_non_blocking_copy=accelerated,
            )
        )


PEERS = (DcpPinned, TorchCheckpointing, TorchSave)


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def make(nbytes: int) -> tuple[torch.nn.ParameterDict, torch.optim.Optimizer]:
    """Return parameters and an Adam with moments, of about `nbytes` in all."""
    each = min(TENSOR_NBYTES, nbytes // 6)
    count = max(1, nbytes // (3 * each))
    weights = {f"w{n}": torch.nn.Parameter(torch.randn(each // 4, device=DEVICE)) for n in range(count)}
    model = torch.nn.ParameterDict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return all tensors by flat names, for systems that take nothing else."""
    found: State = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return found


def pinned_copy(tensors: State) -> float:
    """Return the bytes per second of a copy of all tensors into pinned memory: the limit."""
    pinned = DEVICE is not None and DEVICE.type != "cpu"
    largest = max(tensor.nbytes for tensor in tensors.values())
    host = torch.empty(largest, dtype=torch.uint8, pin_memory=pinned)
    total = sum(tensor.nbytes for tensor in tensors.values())

    def copy() -> None:
        for tensor in tensors.values():
            host[: tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8), non_blocking=True)
        synchronize()

    return total / min(timed(copy) for _ in range(3))


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Training:
    """Steps that keep the device busy, each about `seconds` long, and then step the optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, seconds: float) -> None:
        self._optimizer = optimizer
        size = 4096 if torch.accelerator.is_available() else 256
        self._matrix = torch.randn(size, size, device=DEVICE) / size**0.5
        self._products = 1
        self.compute()
        synchronize()
        self._products = max(1, int(seconds / max(1e-6, timed(lambda: (self.compute(), synchronize())))))

    def compute(self) -> None:
        product = self._matrix
        for _ in range(self._products):
            product = product @ self._matrix

    def run(self, steps: int, every: int, save: Callable[[int], Any] | None) -> float:
        """Return the seconds of some steps, with a save after each `every`-th."""
        synchronize()
        began = time.perf_counter()
        for step in range(1, steps + 1):
            self.compute()
            self._optimizer.step()
            if save is not None and step % every == 0:
                save(step)
        synchronize()
        return time.perf_counter() - began


def measure_engine(folder: Path, nbytes: int, overlap: bool, limit: float) -> dict[str, Any]:
    """Return what saves block, what training loses by one, the copy's rate, and how long until durable."""
    model, optimizer = make(nbytes)
    state = {"model": model, "optimizer": optimizer}
    total = sum(tensor.nbytes for tensor in tensors_of(model, optimizer).values())
    training = Training(optimizer, 2 * total / limit)
    calls: list[float] = []
    result: dict[str, Any] = {"nbytes": total}
    with ce.Checkpointer(folder / "run", overlap=overlap, keep_last=1) as run:
        durable, copies = [], []
        for step in range(1, SAVES + 1):
            training.run(1, 1, None)
            synchronize()
            began = time.perf_counter()
            handle = run.save(step, state)
            calls.append(time.perf_counter() - began)
            stats = handle.durable.result()
            durable.append(time.perf_counter() - began)
            copies.append(sum(phase.ended - phase.began for phase in stats.phases if phase.name == "copy"))
        result["call_ms"] = 1e3 * statistics.median(calls[1:])
        result["first_call_ms"] = 1e3 * calls[0]
        result["copy_gbps"] = total / statistics.median(copies[1:]) / 1e9
        result["durable_s"] = statistics.median(durable[1:])
        number = SAVES
        for every in (1, 10):
            plain = training.run(every * 2, every, None)

            def save(step: int) -> None:
                nonlocal number
                number += 1
                run.save(number, state)

            with_saves = training.run(every * 2, every, save)
            run.fence()
            result[f"lost_ms_per_save_every_{every}"] = 1e3 * (with_saves - plain) / 2
    began = time.perf_counter()
    ce.load(folder / "run", into=state)
    synchronize()
    result["restore_warm_s"] = time.perf_counter() - began
    drop_cache(folder)
    began = time.perf_counter()
    ce.load(folder / "run", into=state)
    synchronize()
    result["restore_s"] = time.perf_counter() - began
    return result


def measure_peer(kind: Any, folder: Path, nbytes: int) -> dict[str, float]:
    """Return what a save of another system blocks, and how long it takes until it is durable, medians."""
    model, optimizer = make(nbytes)
    tensors = tensors_of(model, optimizer)
    system = kind(folder, tensors)
    stalls, durable = [], []
    try:
        for _ in range(SAVES - 1):
            shutil.rmtree(system.path, ignore_errors=True)
            if system.path.is_file():
                system.path.unlink()
            synchronize()
            stall, end = system.save(tensors)
            stalls.append(stall)
            durable.append(end)
    finally:
        system.close()
    return {"call_ms": 1e3 * statistics.median(stalls[1:]), "durable_s": statistics.median(durable[1:])}


def measure_safetensors(folder: Path, nbytes: int) -> dict[str, float]:
    """Return how long safetensors takes to bring a file to the device."""
    from safetensors.torch import load_file

    model, optimizer = make(nbytes)
    system = Safetensors(folder, {})
    system.write({name: tensor.contiguous() for name, tensor in tensors_of(model, optimizer).items()})
    file = system.path / "state.safetensors"
    drop_cache(folder)
    return {"restore_s": timed(lambda: (load_file(file, device=str(DEVICE)), synchronize()))}


def room(nbytes: int, folder: Path) -> str:
    """Return why a size does not fit, or nothing."""
    if torch.accelerator.is_available() and DEVICE is not None:
        free = torch.get_device_module(DEVICE.type).mem_get_info()[0]
        if free < 1.6 * nbytes:
            return f"{free / 1e9:.1f} GB of the device's memory are free"
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable") and int(line.split()[1]) * 1024 < 2.5 * nbytes:
            return f"{int(line.split()[1]) / 1e6:.1f} GB of memory are free"
    free = shutil.disk_usage(folder).free
    return f"{free / 1e9:.1f} GB of the disk are free" if free < 2.5 * nbytes else ""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all that fits; what does not is under `left_out`, and what failed.

    `--json` is written after each row, which is printed too.
    """
    end = time.monotonic() + options.seconds
    name = "cpu" if not torch.accelerator.is_available() else torch.get_device_module().get_device_name()
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "sizes": {}, "left_out": [], "failed": False}

    print(f"{name}, torch {torch.__version__}", flush=True)

    def keep() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    took = 0.0
    smaller = 0.0
    for gigabytes in options.gigabytes:
        nbytes, label = int(gigabytes * 1e9), f"{gigabytes:g} GB"
        why = room(nbytes, options.folder)
        if not why and smaller and took * gigabytes / smaller > end - time.monotonic():
            why = f"it would take about {took * gigabytes / smaller:.0f} s"
        if why:
            result["left_out"].append(f"{label}: {why}")
            continue
        began = time.monotonic()
        figures = result["sizes"][label] = {}
        try:
            model, optimizer = make(nbytes)
            limit = pinned_copy(tensors_of(model, optimizer))
            del model, optimizer
        except Exception as error:
            result["left_out"].append(f"{label}: {type(error).__name__}: {error}")
            result["failed"] = True
            continue
        figures["pinned copy"] = {"gbps": limit / 1e9}
        tell(label, "pinned copy", figures["pinned copy"])
        parts: dict[str, Callable[[Path], Any]] = {
            "ckptengine, eager": lambda folder: measure_engine(folder, nbytes, False, limit),  # noqa: B023
            "ckptengine, overlapped": lambda folder: measure_engine(folder, nbytes, True, limit),  # noqa: B023
            "safetensors": lambda folder: measure_safetensors(folder, nbytes),  # noqa: B023
        }
        parts |= {kind.name: lambda folder, kind=kind: measure_peer(kind, folder, nbytes) for kind in PEERS}  # noqa: B023
        for part, call in parts.items():
            if time.monotonic() > end:
                result["left_out"].append(f"{label}, {part}: the time is over")
                continue
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                try:
                    figures[part] = call(Path(folder))
                    tell(label, part, figures[part])
                except Exception as error:  # the other figures are still worth having
                    result["left_out"].append(f"{label}, {part}: {type(error).__name__}: {error}")
                    result["failed"] |= "ckptengine" in part
            keep()
        took, smaller = time.monotonic() - began, gigabytes
    return result


def tell(size: str, system: str, figures: dict[str, float]) -> None:
    """Print one system's figures."""
    print(f"{size}  {system}: " + ", ".join(f"{key} {value:,.3f}" for key, value in figures.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="where the figures go too")
    parser.add_argument("--seconds", type=float, default=240.0, help="no part is begun after this time")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 10.0, 40.0], help="sizes of the state")
    options = parser.parse_args()
    # DCP's asynchronous saves ask for a process group.
    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        try:
            result = measure(options)
        finally:
            torch.distributed.destroy_process_group()
    for what in result["left_out"]:
        print(f"left out: {what}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Load what was saved in another sharding, by 4 ranks of one node: bytes read over bytes needed, and seconds.

    python -m benchmarks.reshard [--runs 5] [--layers 8] [--folder DIR] [--json FILE]

Real processes under torchrun with gloo. Each round takes every case by ckptengine and by DCP in turn, after a first
round that isn't counted; loads are cold. Bytes are the kernel's, summed over the ranks (/proc/self/io): `read_bytes` is
what the device delivered, in which the page cache hides that several ranks read the same; `rchar` what the ranks asked
for. `counted` is what ckptengine counts itself. The last case loads a directory of Hugging Face, by DCP through its
`HuggingFaceStorageReader`.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ckptengine as ce
from benchmarks.disk import drop_cache
from ckptengine.comm.select import current
from ckptengine.load.loader import LoadOptions, load_newest
from ckptengine.storage.open import open_storage

RANKS = 4
ROWS, COLUMNS = 2048, 4096
SYSTEMS = ("ckptengine", "DCP")
State = dict[str, torch.Tensor]


def whole(layers: int, fill: Callable[[int], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return all tensors of the state, 32 MiB each."""
    return {f"layer-{number}.weight": fill(number) for number in range(layers)}


def random_layer(number: int) -> torch.Tensor:
    return torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(number))


def sharded(tensors: State, dim: int) -> State:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(tensor, mesh, [Shard(dim)]) for name, tensor in tensors.items()}


def fsdp(tensors: State) -> State:
    """Return the parameters of a model under FSDP2."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Module()
    for name, tensor in tensors.items():
        layer = nn.Linear(COLUMNS, ROWS, bias=False, device="meta")
        layer.weight = nn.Parameter(tensor)
        model.add_module(name.removesuffix(".weight"), layer)
    fully_shard(model, mesh=mesh)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


HUB = "Hugging Face to FSDP 4"
# What is saved by how many ranks, and what it is loaded into by how many.
CASES = {
    "Shard(0) to Shard(1)": (4, lambda tensors: sharded(tensors, 0), 4, lambda tensors: sharded(tensors, 1)),
    "DDP replicas": (4, dict, 4, dict),
    "FSDP 4 to 2": (4, fsdp, 2, fsdp),
    "FSDP 2 to 3": (2, fsdp, 3, fsdp),
    HUB: (1, dict, 4, fsdp),  # a directory of safetensors files and their index, by either system
}


@contextlib.contextmanager
def group(name: str, size: int) -> Iterator[bool]:
    """Form a process group of the first processes; yields whether this one is in it."""
    rank = int(os.environ["RANK"])
    if rank >= size:
        yield False
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, timedelta(minutes=10))
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=size)
    yield True
    dist.barrier()
    dist.destroy_process_group()


def save_hub(path: Path, state: State) -> None:
    """Write two tensors to a file, as models of some size are published."""
    path.mkdir()
    names, where = sorted(state), {}
    for begin in range(0, len(names), 2):
        file = f"model-{begin // 2 + 1:05}-of-{(len(names) + 1) // 2:05}.safetensors"
        safetensors.torch.save_file({name: state[name] for name in names[begin : begin + 2]}, path / file)
        where |= dict.fromkeys(names[begin : begin + 2], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def save(case: str, system: str, path: Path, state: State) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    dist.barrier()
    if case == HUB:
        save_hub(path, state)
    elif system == "DCP":
        dcp.save(state, checkpoint_id=path)
    else:
        ce.save(path, state)


def kernel_bytes() -> tuple[int, int]:
    """Return what this process has read so far: `read_bytes`, `rchar`."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["rchar"])


def load(case: str, system: str, path: Path, state: State) -> dict[str, float]:
    """Load cold; return seconds until all ranks are done, and bytes summed over the ranks."""
    gc.collect()
    if dist.get_rank() == 0:
        drop_cache(path)
    dist.barrier()
    before, began = kernel_bytes(), time.perf_counter()
    needed = 0
    if system == "DCP" and case == HUB:
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)))
        read = 0
    elif system == "DCP":
        dcp.load(state, checkpoint_id=path)
        read = 0
    else:
        counts = load_newest(open_storage(path), state, current(), 600, LoadOptions()).counts
        read, needed = counts.read, counts.node_needed
    dist.barrier()
    seconds = time.perf_counter() - began
    sums = torch.tensor([b - a for a, b in zip(before, kernel_bytes(), strict=True)] + [read], dtype=torch.int64)
    dist.all_reduce(sums)
    return {
        "seconds": seconds,
        "read_bytes": int(sums[0]),
        "rchar": int(sums[1]),
        "counted": int(sums[2]),
        "needed": needed,
    }


def forget(state: State) -> None:
    """Overwrite what this rank holds, which also makes sure that its memory is there."""
    for tensor in state.values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)


def check(state: State, expected: State) -> None:
    for name, tensor in state.items():
        wanted = expected[name]
        if isinstance(tensor, DTensor):
            wanted = distribute_tensor(wanted, tensor.device_mesh, tensor.placements).to_local()
            tensor = tensor.to_local()
        if not torch.equal(tensor, wanted):
            raise AssertionError(f"{name} came back changed")


def work(folder: Path, runs: int, layers: int) -> None:
    """Be one rank of the job; rank 0 writes all figures to `FOLDER/result.json`."""
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[dict[str, float]]]] = {case: {s: [] for s in SYSTEMS} for case in CASES}
    for case, (savers, saved, loaders, wanted) in CASES.items():
        paths = {system: folder / system for system in SYSTEMS}
        with group(f"{case}/save", savers) as mine:
            if mine:
                state = saved(whole(layers, random_layer))
                for system, path in paths.items():
                    save(case, system, path, state)
                del state
        with group(f"{case}/wait", RANKS):
            pass
        with group(f"{case}/load", loaders) as mine:
            if mine:
                state = wanted(whole(layers, random_layer))
                for number in range(runs + 1):
                    for system, path in paths.items():
                        forget(state)
                        found = load(case, system, path, state)
                        if number:
                            results[case][system].append(found)
                        else:
                            check(state, whole(layers, random_layer))
                del state
        with group(f"{case}/next", RANKS):
            pass
    if int(os.environ["RANK"]) == 0:
        (folder / "result.json").write_text(json.dumps(results))


def run(runs: int = 5, layers: int = 8, folder: Path | None = None) -> dict[str, object]:
    """Return all figures, by case and system, of a job of 4 ranks on this node."""
    with tempfile.TemporaryDirectory(dir=folder or Path.cwd(), prefix="bench-") as name:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        command += ["-m", "benchmarks.reshard", "--work", name, "--runs", str(runs), "--layers", str(layers)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run(command, env=environment, check=True)
        cases = json.loads((Path(name) / "result.json").read_text())
    return {"nbytes": layers * ROWS * COLUMNS * 4, "ranks": RANKS, "runs": runs, "cases": cases}


def show(result: dict) -> None:
    """Print the table."""
    console = Console(width=120)
    size = f"{result['nbytes'] / 1e6:.0f} MB, {result['ranks']} ranks on one node, {result['runs']} rounds"
    table = Table(title=f"{size}: medians (min to max); bytes over bytes needed")
    for name in ("case", "system", "counted", "from the device", "asked for", "cold load, s", "DCP's over ours"):
        table.add_column(name, justify="left" if name in ("case", "system") else "right")
    for case, systems in result["cases"].items():
        for system, found in systems.items():
            seconds = [one["seconds"] for one in found]

            def ratio(key: str, found: list[dict[str, float]] = found) -> str:
                return f"{statistics.median(one[key] / (one['needed'] or result['nbytes']) for one in found):.3f}"

            pairs = zip((one["seconds"] for one in systems["DCP"]), seconds, strict=True)
            table.add_row(
                case,
                system,
                ratio("counted") if system != "DCP" else "",
                ratio("read_bytes"),
                ratio("rchar"),
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
                f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}x" if system != "DCP" else "",
            )
    console.print(table)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reshard", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8, help="of 32 MiB each")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: a new one here)")
    parser.add_argument("--json", type=Path, default=None, help="also write all figures there")
    parser.add_argument("--work", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.work:
        work(arguments.work, arguments.runs, arguments.layers)
        return
    result = run(arguments.runs, arguments.layers, arguments.folder)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""`suite`: checkpoints of a sharded language model by 8 processes, written and read back 10 times each.

The state is that of a Llama-like model of 175 M parameters as ZeRO-3 holds it, 14 bytes for each parameter, 2.28 GiB
in all: bf16 weights, fp32 master weights and moments, every tensor flattened and cut into 8 equal shards. fsync is
included in each write. Each rank reads what the next one wrote, so that no rank finds its own bytes, after the page
cache has been dropped. An operation takes as long as its slowest rank. Every value that is read is compared.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.disk import drop_cache, remove, require_room, sync_directories
from benchmarks.options import Options
from benchmarks.peers import stats_of
from benchmarks.processes import answer, fresh, job
from benchmarks.rounds import best_of, median_ratio, rotated, spread
from benchmarks.table import OURS, Target, show_table, show_targets

RANKS, ROUNDS = 8, 10
HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, VOCABULARY = 1024, 3584, 8, 8, 2, 32064
KINDS = {"weights": torch.bfloat16, "master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
SYSTEMS = (OURS, "DCP save", "DCP async")
FULL_NBYTES = 2_447_000_000

State = dict[str, DTensor]


def lengths(scale: float = 1.0) -> dict[str, int]:
    """Return the number of elements of each of the model's tensors, a multiple of the ranks."""
    hidden, wide = HIDDEN, FEED_FORWARD
    kv = hidden // HEADS * KV_HEADS
    layer = {
        "attention.q": hidden * hidden,
        "attention.k": kv * hidden,
        "attention.v": kv * hidden,
        "attention.o": hidden * hidden,
        "mlp.gate": wide * hidden,
        "mlp.up": wide * hidden,
        "mlp.down": hidden * wide,
        "norm_attention": hidden,
        "norm_mlp": hidden,
    }
    full = {f"layers.{number}.{name}": length for number in range(LAYERS) for name, length in layer.items()}
    full |= {"embedding": VOCABULARY * hidden, "norm": hidden, "head": VOCABULARY * hidden}
    return {name: max(1, round(length * scale) // RANKS) * RANKS for name, length in full.items()}


def run(options: Options) -> dict[str, Any]:
    """Return the seconds of the slowest rank for each write and read, by system."""
    require_room(options.folder, int(3 * FULL_NBYTES * options.scale))
    folder = options.folder / "suite"
    folder.mkdir()
    arguments = {"folder": str(folder), "scale": options.scale, "rounds": options.rounds(ROUNDS)}
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    result: dict[str, Any] = fresh("benchmarks.suite", arguments, options.folder, options.timeout, launcher=launcher)
    result["targets"] = [target.as_json() for target in targets(result["systems"])]
    return result


def targets(systems: dict[str, Any]) -> list[Target]:
    """Return ckptengine against the faster of DCP's ways, in each round."""
    peers = [one for name, one in systems.items() if name != OURS]
    return [
        Target(
            f"{operation}, times as fast as the faster of DCP's",
            median_ratio(best_of([one[operation] for one in peers]), systems[OURS][operation]),
            bound,
            "×",
            False,
        )
        for operation, bound in (("write", 2.0), ("read", 1.5))
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table and the targets."""
    rows = []
    gib = result["nbytes"] / 2**30
    for name, one in result["systems"].items():
        cells = [spread(one["stall"]).text()]
        for operation in ("write", "read"):
            cells += [spread(one[operation]).text(), f"{gib / statistics.median(one[operation]):.2f}"]
        rows.append((name, *cells))
    title = f"suite: {gib:.2f} GiB in {result['tensors']} tensors over {RANKS} processes; seconds of the slowest rank"
    columns = ("system", "stall", "write, durable", "GiB/s", "read, cold", "GiB/s")
    show_table(console, title, columns, rows)
    show_targets(console, (Target.of(one) for one in result["targets"]), "suite: targets")


# ---- in each of the processes ----


def shard(name_number: int, part: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what lies in one shard: bits that differ by tensor, shard and place."""
    bits = torch.arange(length, dtype=torch.int32).mul_(2654435).add_(name_number * 7919 + part * 104729)
    # As bits of the dtype, kept finite, so that equal bits are equal values.
    return (
        (bits & 0x3FFFFFFF).view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).abs_().view(dtype)
    )


def sharded_state(mesh: DeviceMesh, part: int, scale: float, filled: bool) -> State:
    """Return this rank's shards, `part` of 8, as DTensors over a mesh in which that is the rank's place."""
    state: State = {}
    for number, (name, dtype, length) in enumerate(tensors(scale)):
        local = shard(number, part, length // RANKS, dtype) if filled else torch.zeros(length // RANKS, dtype=dtype)
        state[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(length,), stride=(1,))
    return state


def tensors(scale: float) -> list[tuple[str, torch.dtype, int]]:
    """Return name, dtype and number of elements of all tensors of the state."""
    return [(f"{kind}.{name}", dtype, n) for kind, dtype in KINDS.items() for name, n in lengths(scale).items()]


def changed(state: State, part: int) -> list[str]:
    """Return the names of the tensors whose shard is not what was written."""
    return [
        name
        for number, (name, tensor) in enumerate(state.items())
        if not torch.equal(
            tensor.to_local().view(torch.uint8),
            shard(number, part, tensor.to_local().numel(), tensor.dtype).view(torch.uint8),
        )
    ]


def writers() -> dict[str, Callable[[State, Path], Callable[[], Any]]]:
    """Return for each system what starts a save, and gives what waits until it is durable."""
    import torch.distributed.checkpoint as dcp

    import ckptengine as ce

    group = dist.new_group(backend="gloo")  # for DCP's background thread

    def engine(state: State, path: Path) -> Callable[[], Any]:
        return ce.async_save(path, state).durable.result

    def dcp_save(state: State, path: Path) -> Callable[[], Any]:
        dcp.save(state, checkpoint_id=path)
        return lambda: None

    def dcp_async(state: State, path: Path) -> Callable[[], Any]:
        return dcp.async_save(state, checkpoint_id=path, process_group=group).result

    return dict(zip(SYSTEMS, (engine, dcp_save, dcp_async), strict=True))


def write(system: str, begin: Callable[[State, Path], Callable[[], Any]], state: State, path: Path) -> dict[str, Any]:
    """Save on this rank and return its seconds, and what ckptengine reported."""
    dist.barrier()
    began = time.perf_counter()
    finish = begin(state, path)
    stall = time.perf_counter() - began
    stats = finish()
    if system != OURS and dist.get_rank() == 0:
        sync_directories(path)  # DCP syncs its files
    found: dict[str, Any] = {"stall": stall, "write": time.perf_counter() - began}
    if system == OURS:
        found["stats"] = stats_of(stats)
    return found


def read(system: str, target: State, path: Path) -> float:
    """Load on this rank and return its seconds."""
    import torch.distributed.checkpoint as dcp

    import ckptengine as ce

    dist.barrier()
    began = time.perf_counter()
    if system == OURS:
        ce.load(path, into=target)
    else:
        dcp.load(target, checkpoint_id=path)
    return time.perf_counter() - began


def on_rank_0(action: Callable[[Path], None], path: Path) -> None:
    """Do something with a checkpoint's files while the others wait."""
    dist.barrier()
    if dist.get_rank() == 0:
        action(path)
    dist.barrier()


def work(folder: Path, scale: float, rounds: int) -> dict[str, Any]:
    """Take all writes and reads on this rank and return all ranks' figures."""
    rank = dist.get_rank()
    following = (rank + 1) % RANKS
    # In the second mesh, this rank has the place of the one after it.
    mesh = DeviceMesh("cpu", torch.arange(RANKS))
    shifted = DeviceMesh("cpu", torch.arange(RANKS).roll(1))
    state = sharded_state(mesh, rank, scale, filled=True)
    target = sharded_state(shifted, following, scale, filled=False)
    begins = writers()
    found: dict[str, Any] = {name: {"stall": [], "write": [], "read": []} for name in SYSTEMS}
    ranks: list[Any] = []
    for number in range(rounds + 1):  # the first warms up
        for name in rotated(SYSTEMS, number):
            path = folder / name.replace(" ", "-")
            on_rank_0(remove, path)
            mine = write(name, begins[name], state, path)
            on_rank_0(drop_cache, path)
            for tensor in target.values():
                tensor.to_local().zero_()
            mine["read"] = read(name, target, path)
            mine["changed"] = changed(target, following)
            everyone: list[Any] = [None] * RANKS
            dist.all_gather_object(everyone, mine)
            if wrong := [(place, one["changed"][0]) for place, one in enumerate(everyone) if one["changed"]]:
                raise AssertionError(f"{name}: came back changed, on rank {wrong[0][0]}: {wrong[0][1]}")
            if number:
                for operation, seconds in found[name].items():
                    seconds.append(max(one[operation] for one in everyone))
            if name == OURS:
                ranks = [one["stats"] for one in everyone]
            on_rank_0(remove, path)
    size = sum(length * dtype.itemsize for _, dtype, length in tensors(scale))
    return {"systems": found, "nbytes": size, "tensors": len(state), "ranks": ranks}


def main() -> None:
    """Run one of the processes, for `fresh`."""
    given = job()
    dist.init_process_group("gloo")
    result = work(Path(given["folder"]), given["scale"], given["rounds"])
    if dist.get_rank() == 0:
        answer(given, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

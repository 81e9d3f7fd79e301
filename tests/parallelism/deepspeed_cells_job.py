"""DeepSpeed from and to pipeline stages and parts by hand: `deepspeed_cells_job.py FOLDER`, on four processes.

Each case saves a network that was trained under it; an engine of each stage of ZeRO, on three ranks, loads all of
them, saves, and each case loads that.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import torch
import torch.distributed as dist
from drawn_job import bits, build, check_loaded, check_stored
from drawn_layouts import Sizes, network, take_steps, whole
from groups import group, process_rank, report

import ckptengine as ce
from ckptengine.comm.select import current
from ckptengine.load.loader import LoadOptions, load_newest
from ckptengine.storage.open import open_storage

CASES = (
    "1-whole", "2-pipeline-2", "4-pipeline-4", "4-pipeline-fsdp2", "2-by-hand", "3-by-hand", "4-by-hand-2x2",
    "4-pipeline-by-hand", "3-interleaved", "3-zero", "2-fsdp1-orig",
)  # fmt: skip
SIZES, RANKS = Sizes(), 3
ONLY = LoadOptions.of(["model", "optimizer"], None, True, False)


def engine_of(stage: int) -> Any:
    import deepspeed

    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False  # it would compile an operator
    deepspeed.init_distributed("gloo")
    built = whole(network(SIZES, 2), SIZES, False)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=built.model, optimizer=built.optimizer, config=config)
    return engine


def held(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what an engine's ranks have together, put together by DeepSpeed."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()  # DeepSpeed looks for the moments of ZeRO 1 and 2 in its first step
    for name, parameter in engine.module.named_parameters():
        yield f"param {name}", safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            yield f"{key} {name}", safe_get_full_optimizer_state(parameter, key)
    yield from ((f"buffer {name}", buffer) for name, buffer in engine.module.named_buffers())


def wanted() -> Iterator[tuple[str, torch.Tensor]]:
    built = whole(network(SIZES, 1), SIZES, False)
    take_steps(built)
    for name, parameter in built.model.named_parameters():
        yield f"param {name}", parameter.detach()
        yield from ((f"{k} {name}", one) for k, one in built.optimizer.state[parameter].items() if k != "step")
    yield from ((f"buffer {name}", buffer) for name, buffer in built.model.named_buffers())


def load_into_engine(path: Path, stage: int) -> tuple[Any, list[str]]:
    from ckptengine.integrations import deepspeed as ce_deepspeed

    engine = engine_of(stage)
    loaded = load_newest(open_storage(path), ce_deepspeed.state(engine), current(), 60, ONLY)
    have, want = ({name: bits(one) for name, one in some} for some in (held(engine), wanted()))
    wrong = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
    read = torch.tensor(loaded.counts.read)
    dist.all_reduce(read)
    wrong += [] if int(read) <= 1.05 * loaded.counts.node_needed else [f"{int(read)} bytes read"]
    return engine, wrong


def main(folder: Path) -> None:
    from ckptengine.integrations import deepspeed as ce_deepspeed

    torch.set_num_threads(1)
    problems: dict[str, str] = {}

    def note(what: str, wrong: list[str]) -> None:
        if wrong:
            problems[what] = "; ".join(wrong[:8])

    for case in CASES:
        with group(f"{case} saves", int(case[0])) as mine:
            if mine:
                built = build(case, SIZES, False, 1)
                take_steps(built)
                ce.save(folder / case, built.state, timeout=60)
    with group("deepspeed", RANKS) as mine:
        for stage in (1, 2, 3) if mine else ():
            for case in CASES:
                try:
                    engine, wrong = load_into_engine(folder / case, stage)
                except Exception:
                    wrong = [traceback.format_exc(limit=-5)]
                note(f"{case} → deepspeed-{stage}", wrong)
            ce.save(folder / f"deepspeed-{stage}", ce_deepspeed.state(engine), timeout=60)
            if dist.get_rank() == 0:
                note(f"deepspeed-{stage}", check_stored(folder / f"deepspeed-{stage}", SIZES, False))
    for case in CASES:
        with group(f"{case} loads", int(case[0])) as mine:
            for stage in (1, 2, 3) if mine else ():
                try:
                    wrong = check_loaded(folder / f"deepspeed-{stage}", case, SIZES, False, ONLY)
                except Exception:
                    wrong = [traceback.format_exc(limit=-5)]
                note(f"deepspeed-{stage} → {case}", wrong)
    report(folder, {f"{what} on rank {process_rank()}": problem for what, problem in problems.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Loads a checkpoint where torch can't be imported and compares it with a reference; prints what differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["torch"] = None  # every import of it fails from here on

import numpy as np  # noqa: E402

import ckptengine as ce  # noqa: E402


def compare(path: Path, raw: dict[str, np.ndarray], names: dict[str, list]) -> list[str]:
    loaded = ce.load(path)
    model, state = loaded["model"], loaded["optimizer"]["state"]
    wrong = []
    for name, (dtype, shape) in names.items():
        kind, _, key = name.partition("/")
        array = model[key] if kind in ("param", "buffer") else state[f"model.{key}"][kind]
        if type(array) is not np.ndarray or f"torch.{array.dtype.name}" != dtype or list(array.shape) != shape:
            wrong.append(f"{name}: {array.dtype} {array.shape}")
        elif array.tobytes() != raw[name].tobytes():
            wrong.append(name)
    if model["head.weight"] is not model["embed.weight"]:
        wrong.append("the tied weight")
    if not np.array_equal(loaded["table"], np.arange(15, dtype=np.int32).reshape(5, 3)):
        wrong.append("table")
    if loaded["words"] != {"step": 2, "pi": 3.5}:
        wrong.append("words")
    return wrong


def main() -> None:
    folder = Path(sys.argv[1])
    raw, names = dict(np.load(folder / "reference.npz")), json.loads((folder / "reference.json").read_text())
    found = {path.name: compare(path, raw, names) for path in sorted(folder.iterdir()) if path.is_dir()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

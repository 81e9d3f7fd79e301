"""The rooms of the package and the order in which they lie on each other: imports go downhill only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import ckptengine

PACKAGE = Path(ckptengine.__file__).parent

# From the ground up. A room may import the rooms of lower floors, and nothing of its own floor but itself.
FLOORS = (
    ("errors", "schema", "lifecycle", "native", "_native"),
    ("counters", "frameworks", "layout", "comm"),
    ("state", "storage"),
    ("archive", "data"),
    ("catalog", "snapshot", "foreign"),
    ("save", "load"),
    ("tiers", "inspect", "export", "differences"),
    ("policy", "audit"),
    ("api", "checkpointer"),
    ("ckptengine",),
    ("torch", "mindspore", "zarr", "cli"),
    ("__main__", "dcp"),
    ("integrations",),
)

TRAINERS = {"lightning", "transformers", "accelerate", "peft", "torchtitan"}
FRAMEWORKS = {"torch", "torchdata", "torchmetrics", "mindspore", "mpi4py", "jax", "tensorflow"} | TRAINERS
# Who may import a framework or a trainer: its adapter's room, and the module of `comm` through which its ranks talk.
AT_HOME = {"torch", "dcp", "integrations", "mindspore", "comm.torch", "comm.mindspore", "comm.mpi"}
# Who may import a module by its name as a string; `ckptengine` itself imports its own names when they are asked for.
BY_NAME = {"frameworks.registry", "ckptengine"}


@dataclass(frozen=True, slots=True)
class Import:
    """An import statement, or a call that imports by name (`target` is empty then)."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        where = self.module.removeprefix("ckptengine.").replace(".", "/")
        return f"ckptengine/{where}, line {self.line}: imports {self.target or 'a module by a name'}"


def modules_of(package: Path) -> dict[str, ast.Module]:
    """Return the modules below a folder, parsed, by their dotted names; the folder is the package `ckptengine`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(("ckptengine", *(parts[:-1] if parts[-1] == "__init__" else parts)))
        found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


def imports_of(modules: Mapping[str, ast.Module]) -> Iterator[Import]:
    """Yield all imports, those inside of functions and under TYPE_CHECKING too."""
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (Import(name, alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}, line {node.lineno}: a relative import"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    is_module = inner in modules or inner == "ckptengine._native"
                    yield Import(name, inner if is_module else f"{node.module}", node.lineno)
            elif isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in ("import_module", "__import__"):
                    yield Import(name, "", node.lineno)


@pytest.fixture(scope="module")
def package() -> list[Import]:
    return list(imports_of(modules_of(PACKAGE)))


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def inside(module: str, places: set[str]) -> bool:
    own = module.removeprefix("ckptengine.")
    return own in places or own.partition(".")[0] in places


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "ckptengine"


def upward(found: Iterable[Import]) -> list[str]:
    """Return the imports that do not lead to a lower floor, or into the own room."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    return [
        str(one)
        for one in found
        if is_ours(one.target)
        and room_of(one.module) != room_of(one.target)
        and floor[room_of(one.module)] <= floor[room_of(one.target)]
    ]


def circles(found: Iterable[Import]) -> list[str]:
    """Return the circles between modules, each as the names along it."""
    edges: dict[str, set[str]] = {}
    for one in found:
        if is_ours(one.target):
            edges.setdefault(one.module, set()).add(one.target)
    done: set[str] = set()
    result = []

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            result.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for target in sorted(edges.get(module, ())):
                visit(target, [*way, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return result


def of_frameworks(found: Iterable[Import]) -> list[str]:
    """Return the imports of frameworks, and those by name, outside of where they belong."""
    return [
        str(one)
        for one in found
        if (one.target.partition(".")[0] in FRAMEWORKS and not inside(one.module, AT_HOME))
        or (not one.target and not inside(one.module, BY_NAME))
    ]


def test_every_room_has_a_floor() -> None:
    files = [path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")]
    rooms = {"_native", *("ckptengine" if name == "__init__" else name for name in files)}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_imports_go_downhill_only(package: list[Import]) -> None:
    assert upward(package) == []


def test_no_modules_import_each_other_in_a_circle(package: list[Import]) -> None:
    assert circles(package) == []


def test_the_core_imports_no_framework(package: list[Import]) -> None:
    assert of_frameworks(package) == []


def test_what_breaks_the_rules_is_named(tmp_path: Path) -> None:
    """A tree with one fault of each kind, each hidden in a function or a condition."""
    files = {
        "state/tree.py": "def late():\n    from ckptengine.save import saver\n",
        "layout/box.py": "from ckptengine.layout.grid import x\n",
        "layout/grid.py": "if TYPE_CHECKING:\n    import ckptengine.layout.box\n",
        "comm/torch.py": "import torch\n",
        "load/fill.py": "try:\n    import torch.nn\nexcept ImportError:\n    pass\n",
        "load/seen.py": "def late(name):\n    return importlib.import_module(name)\n",
        "save/saver.py": "from ckptengine import errors\nfrom ckptengine.state.tree import y\n",
        "errors.py": "",
        "catalog/root.py": "from ckptengine import Checkpointer\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    modules = modules_of(tmp_path)
    assert upward(imports_of(modules)) == [
        "ckptengine/catalog/root, line 1: imports ckptengine",
        "ckptengine/state/tree, line 2: imports ckptengine.save.saver",
    ]
    assert circles(imports_of(modules)) == [
        "ckptengine.layout.box -> ckptengine.layout.grid -> ckptengine.layout.box",
        "ckptengine.save.saver -> ckptengine.state.tree -> ckptengine.save.saver",
    ]
    assert of_frameworks(imports_of(modules)) == [
        "ckptengine/load/fill, line 2: imports torch.nn",
        "ckptengine/load/seen, line 2: imports a module by a name",
    ]


def test_the_floors_are_those_that_the_design_draws() -> None:
    text = (PACKAGE.parent / "docs" / "design.md").read_text().partition("## The layers")[2].split("```")[1]
    drawn = [set(re.findall(r"\w+", line[:48])) for line in text.splitlines()]
    below = [rooms for rooms in reversed(drawn) if rooms]
    assert below == [{"__init__" if room == "ckptengine" else room for room in floor} for floor in FLOORS]


def test_fork_and_exit_are_registered_in_one_place(package: list[Import]) -> None:
    assert {one.module for one in package if one.target == "atexit"} == {"ckptengine.lifecycle"}
    naming = [path for path in PACKAGE.rglob("*.py") if "register_at_fork" in path.read_text()]
    assert naming == [PACKAGE / "lifecycle.py"]

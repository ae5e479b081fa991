"""Who may import whom: the architecture, read from the imports."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LEAVES = {"axes", "architecture", "bounded", "config", "exit_status", "faults", "finetune", "matrices", "mixture",
          "moe.types", "task"}
MAY_IMPORT = {
    "axes": set(),
    "architecture": set(),
    "bounded": set(),
    "task": set(),
    "mixture": set(),
    "exit_status": set(),
    "faults": set(),
    "finetune": set(),
    "peers": set(),
    "matrices": set(),
    "allocator": set(),
    "compiler_options": set(),
    "processes": set(),
    "config": set(),
    "moe.types": set(),
    "sharding": set(),
    "gpus": set(),
    "native": set(),
    "layers": {"sharding", "gpus"},
    "moe.balance": set(),
    "moe.capacity": set(),
    "moe.routing": {"moe.balance"},
    "moe.dispatch": {"sharding"},
    "moe.blocked": {"sharding", "layers"},
    "moe.tiles": set(),
    "moe.grouped_hopper": {"sharding", "gpus", "moe.tiles"},
    "moe.grouped_native": {"native", "sharding"},
    "moe.grouped_triton": {"gpus", "moe.tiles"},
    "moe.grouped": {"moe.grouped_hopper", "moe.grouped_native", "moe.grouped_triton"},
    "moe.experts": {"gpus", "layers", "moe.blocked", "moe.grouped", "moe.grouped_native"},
    "moe.slots": {"layers", "moe.experts"},
    "moe.merged": {"layers"},
    "moe.weights": set(),
    "moe.layer": {"sharding", "layers", "moe.balance", "moe.blocked", "moe.capacity", "moe.routing", "moe.dispatch",
                  "moe.experts", "moe.slots", "moe.merged", "moe.weights"},
    "moe.heads": {"moe.balance", "moe.experts", "moe.layer", "moe.routing"},
    "models": {"sharding", "layers", "moe.experts", "moe.heads", "moe.layer", "moe.routing", "moe.weights"},
    "objectives": {"sharding"},
    "objectives.masked_lm": set(),
    "objectives.prefix_lm": set(),
    "objectives.span_corruption": set(),
    "metrics": set(),
    "data": {"objectives.masked_lm", "objectives.prefix_lm", "objectives.span_corruption"},
    "checkpoint": {"sharding", "peers"},
    "evaluation": {"models", "checkpoint", "sharding", "metrics"},
    "generation": {"models", "checkpoint", "layers", "moe.routing"},
    "train.adam": set(),
    "train.optimizer": {"sharding", "train.adam"},
    "train.state": {"sharding"},
    "train.step": {"objectives", "train.adam", "train.optimizer", "train.state"},
    "train.best": set(),
    "train": {"compiler_options", "processes", "sharding", "models", "moe.routing", "objectives", "data", "checkpoint",
              "evaluation", "metrics"},
    "hf": {"sharding", "models", "moe.routing", "evaluation", "checkpoint", "data"},
    "commands": {"processes", "sharding", "checkpoint", "data", "evaluation", "generation", "metrics", "models", "train"},
    "compress": {"checkpoint", "data", "evaluation", "models", "train"},
    "harness": {"checkpoint", "data", "evaluation", "generation", "models"},
    "main": {"allocator", "commands", "peers", "processes"},
    "moejax": {"evaluation", "generation", "hf"},
}
"""Room -> rooms that it may import, beside itself and the leaves, which all may import."""


def modules() -> dict[str, pathlib.Path]:
    names = {}
    for path in sorted((ROOT / "moejax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def room(module: str) -> str:
    """The longest name in the table that the module is or lies in."""
    inner = module.removeprefix("moejax").removeprefix(".") or "moejax"
    while inner not in MAY_IMPORT:
        assert "." in inner, f"{module} belongs to no room: add it to the table"
        inner = inner.rsplit(".", 1)[0]
    return inner


def imports(path: pathlib.Path, known: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return {name for name in found if name.split(".")[0] == "moejax"}


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module):
    here = room(module)
    allowed = MAY_IMPORT[here] | LEAVES | {here}
    for imported in imports(modules()[module], set(modules())):
        other = room(imported) if imported in modules() or imported == "moejax" else room(imported.rsplit(".", 1)[0])
        if here == "train" and other.startswith("train"):
            continue
        if other == "moejax" and here != "moejax":
            continue  # `from moejax import room` names the package; the room itself is looked up on its own
        assert other in allowed, f"{module} ({here}) imports {imported} ({other})"


def test_a_wrong_import_is_seen(tmp_path):
    (tmp_path / "wrong.py").write_text("from moejax.train import loop\nfrom moejax import main\n")
    assert imports(tmp_path / "wrong.py", set(modules())) == {"moejax.train.loop", "moejax.main"}


def test_nothing_imports_experiments_launch_or_tests():
    for path in (ROOT / "moejax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert not {name.split(".")[0] for name in names} & {"experiments", "launch", "tests"}, path


def test_files_are_short():
    long = {str(path): n for path in (ROOT / "moejax").rglob("*.py")
            if (n := len(path.read_text().splitlines())) > 400}
    assert not long

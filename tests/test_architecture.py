"""The rooms of the package and who may import whom, and a few habits, read from the source text of every module."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mae_et"  # read, never imported: a circle of imports must be told too
#: A room may import only rooms before it. `data/` is one room, ordered inside.
ORDER = (
    *("curriculum", "spectral", "targets"),
    *("decoder", "model", "cost", "config", "finetune_config"),
    *("data.stream", "data.names", "data.photos", "data.shards", "data.webdataset", "data.sources", "data.cache"),
    *("data.pixels", "data.views", "data.decode"),
    *("data.replay", "data.loader", "data.labelled", "data"),
    *(
        "optim",
        "runtime",
        "storage",
        "sharded",
        "run_folder",
        "interop",
        "checkpoint",
        "picture",
        "progress",
        "journal",
    ),
    *("scaling", "plan", "resume", "pretrain", "mixing", "classifier", "evaluation", "finetune", "probe"),
    *("run_record", "compare", "report", "reconstruct", "prepare", "trials", "space", "search", "search_report"),
    *("cli", "__main__", ""),  # "" is mae_et itself
)
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Full names of what a module of mae_et imports, anywhere in its text."""
    rt = ["mae_et", *module.split(".")] if module else ["mae_et"]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = rt[: len(rt) - node.level + is_package] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def rooms(source: str, module: str, is_package: bool = False) -> set[str]:
    """Rooms of mae_et that a module imports. `from . import a, b` are the rooms a and b."""
    found = set()
    for name in imported(source, module, is_package):
        if name == "mae_et" or name.startswith("mae_et."):
            inside = name.removeprefix("mae_et").lstrip(".")
            while inside and inside not in {*ORDER, *MODULES}:  # a name inside a room
                inside = inside.rpartition(".")[0]
            found.add(inside)
    return found


def problems(source: str) -> list[str]:
    """Habits broken, with the line."""
    found = []

    def has(node: ast.AST | None, *names: str) -> bool:
        return node is not None and any(getattr(n, "id", getattr(n, "attr", "")) in names for n in ast.walk(node))

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or has(node.type, "Exception", "BaseException")):
            found.append(f"line {node.lineno}: a blanket except hides bugs; name what may happen")
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        called = ast.unparse(node.func)
        if called.endswith("suppress") and any(has(argument, "Exception", "BaseException") for argument in node.args):
            found.append(f"line {node.lineno}: a blanket suppress hides bugs; name what may happen")
        if called in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            found.append(f"line {node.lineno}: {called} runs code from the file")
        if called.endswith("FileSystemReader") or (called == "dcp.load" and "storage_reader" not in keywords):
            found.append(f"line {node.lineno}: {called} unpickles .metadata, which runs code from the file")
        if called == "torch.load" and keywords.get("weights_only") is not True:
            found.append(f"line {node.lineno}: torch.load without weights_only=True runs code from the file")
        if keywords.get("weights_only", True) is False or keywords.get("allow_pickle", False) is True:
            found.append(f"line {node.lineno}: {called} runs code from the file")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) and "TODO" in token.string:
            found.append(f"line {token.start[0]}: TODO")
    return found


def test_every_module_has_a_place_in_the_order():
    unplaced = sorted(set(MODULES) - set(ORDER))
    assert not unplaced, (
        f"place {', '.join(unplaced)} in ORDER of {Path(__file__).name} and in the design: who may import it?"
    )
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_rooms_above_it(module):
    path = MODULES[module]
    found = rooms(path.read_text(), module, path.name == "__init__.py")
    above = ORDER[: ORDER.index(module)] if module in ORDER else ()
    forbidden = sorted(room or "mae_et" for room in found - set(above))
    assert not forbidden, f"{module or 'mae_et'} may not import {', '.join(forbidden)}, which stand below it"


def test_the_curriculum_needs_only_the_standard_library():
    top = {name.partition(".")[0] for name in imported(MODULES["curriculum"].read_text(), "curriculum", False)}
    assert top <= sys.stdlib_module_names, sorted(top - sys.stdlib_module_names)
    assert "math" in top


@pytest.mark.parametrize("module", MODULES)
def test_habits(module):
    assert not problems(MODULES[module].read_text())


@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py"])
def test_scripts_only_call_into_the_package(script):
    path = PACKAGE.parent / script
    lines = path.read_text().splitlines()
    assert len(lines) <= 15
    assert any("mae_et" in line for line in lines)


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("from .model import create_mae", "cost", {"model"}),
        ("from . import interop, runtime", "pretrain", {"interop", "runtime"}),
        ("from ..curriculum import Stage", "data.loader", {"curriculum"}),
        ("from .decode import train_crop", "data.loader", {"data.decode"}),
        ("from ..data import train_crop", "data.loader", {"data"}),
        ("import torch, mae_et.cli", "model", {"cli"}),
        ("def f():\n    from mae_et.cli import main", "model", {"cli"}),
        ("from mae_et import create_mae", "model", {""}),
        ("from math import pi\nimport torch.nn.functional", "model", set()),
    ],
)
def test_every_way_to_write_an_import_is_seen(source, module, found):
    assert rooms(source, module) == found


def test_imports_of_a_package_are_seen():
    assert rooms("from .decode import train_crop", "data", is_package=True) == {"data.decode"}
    assert rooms("from .cost import flops_per_image", "", is_package=True) == {"cost"}


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (OSError, Exception) as error:\n    pass",
        "with contextlib.suppress(Exception):\n    f()",
        "pickle.load(file)",
        "torch.load(path)",
        "dcp.load(state, checkpoint_id=path)",
        "dcp.load(state, storage_reader=dcp.FileSystemReader(path))",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "x = 1  # TODO: more",
    ],
)
def test_every_broken_habit_is_seen(source):
    assert len(problems(source)) >= 1
    assert not problems("try:\n    torch.load(path, weights_only=True)\nexcept OSError:\n    pass")

"""The rooms of the package and who may import whom, and a few habits, read from the source text of every module."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mae_et"  # read, never imported: a circle of imports must be told too
MAX_LINES = 400
#: From the ground up. A module may import only modules before it, so a room only rooms before it.
ROOMS = {
    "console": "",
    "plan": "shapes curriculum schedules cost flags shared config build gpu report",
    "": "files record spectral targets model layouts interop wrappers hub",
    "data": "config stream workers photos folders tars shards webdataset datasets sources pixels fingerprint views"
    " decode replay loader corruptions labelled prepare measure",
    "engine": "run_folder device runtime attention meters optim storage sharded resume writer step graphs sinks logger"
    " picture progress features run online pretrain",
    "card": "",
    "export": "",
    "checkpoint": "",
    "evaluate": "config encoder classes accuracy augmentation run finetune probe reconstruct",
    "compare": "words runs arms answers compare figures report",
    "search": "config trials space search report",
    "cli": "",
    "__main__": "",
}
ORDER = [
    *(f"{room}.{name}".strip(".") for room, names in ROOMS.items() for name in (names.split() or [""])),
    *(room for room, names in ROOMS.items() if room and names),  # __init__.py of each room
    "",  # mae_et itself
]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Full names of what a module of mae_et imports, anywhere in its text."""
    parts = ["mae_et", *module.split(".")] if module else ["mae_et"]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + is_package] if node.level else []
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
    """Broken habits that ruff (BLE001, S301, FIX002) doesn't see, with the line."""
    found = []
    for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        called = ast.unparse(node.func)
        if called.endswith("suppress") and {"Exception", "BaseException"} & {ast.unparse(each) for each in node.args}:
            found.append(f"line {node.lineno}: a blanket suppress hides bugs; name what may happen")
        if called.endswith("FileSystemReader") or (called == "dcp.load" and "storage_reader" not in keywords):
            found.append(f"line {node.lineno}: {called} unpickles .metadata, which runs code from the file")
        if called == "torch.load" and keywords.get("weights_only") is not True:
            found.append(f"line {node.lineno}: torch.load without weights_only=True runs code from the file")
        if keywords.get("weights_only", True) is False or keywords.get("allow_pickle", False) is True:
            found.append(f"line {node.lineno}: {called} runs code from the file")
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


@pytest.mark.parametrize("module", ["plan.shapes", "plan.curriculum", "plan.schedules", "plan.cost"])
def test_sizes_stages_and_costs_need_only_the_standard_library(module):
    foreign = {name.partition(".")[0] for name in imported(MODULES[module].read_text(), module, False)}
    assert foreign - {"mae_et"} <= sys.stdlib_module_names, sorted(foreign)
    assert rooms(MODULES[module].read_text(), module) <= {"plan.shapes", "plan.curriculum"}


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_long(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: split it by noun"


LIGHT = (
    "plan.report plan.build evaluate.config search.config data.config data.sources compare.compare files console cli "
    "engine.run_folder"
)


def test_what_is_known_before_a_step_needs_no_torch():
    code = f"import sys{''.join(f', mae_et.{module}' for module in LIGHT.split())}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    heavy = {"torch", "torchvision", "timm", "transformers", "matplotlib", "tensorboard"} & set(run.stdout.split())
    assert not heavy, f"{', '.join(heavy)} loaded"
    assert "mae_et.plan.report" in run.stdout.split()


def test_public_names_come_from_the_package_in_any_order(tmp_path):
    from ranks import in_a_process  # which loads torch; all else here reads text

    in_a_process(tmp_path / "log.txt", _import_public_names)


def _import_public_names():
    """Importing the module that has a name must not put itself in the name's place."""
    for module in [name for name in sys.modules if name.partition(".")[0] == "mae_et"]:
        del sys.modules[module]
    package = importlib.import_module("mae_et")
    for backwards in (False, True):
        for name in sorted(package.__all__, reverse=backwards):
            importlib.import_module(getattr(package, name).__module__)
            found: dict = {}
            exec(f"from mae_et import {name}", found)
            assert callable(found[name]) and not inspect.ismodule(found[name]), name
            assert found[name] is getattr(package, name), name
    assert set(package.__all__) <= set(dir(package))
    assert (
        " ".join(sorted(package.__all__))
        == "Curriculum MaskedAutoencoder Stage create_mae efficient_train efficient_train_pp flops_per_image "
        "hog_target low_frequency_crop pixel_target pretrain vanilla"
    )


def test_type_checkers_see_the_public_names_where_they_are():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    homes = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_HOMES")
    assert seen == ast.literal_eval(homes)
    assert (PACKAGE / "py.typed").is_file()


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
        ("from .model import create_mae", "interop", {"model"}),
        ("from . import sharded, runtime", "engine.pretrain", {"engine.sharded", "engine.runtime"}),
        ("from ..plan.curriculum import Stage", "data.loader", {"plan.curriculum"}),
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
    assert rooms("from .model import create_mae", "", is_package=True) == {"model"}


@pytest.mark.parametrize(
    "source",
    [
        "with contextlib.suppress(Exception):\n    f()",
        "torch.load(path)",
        "dcp.load(state, checkpoint_id=path)",
        "dcp.load(state, storage_reader=dcp.FileSystemReader(path))",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_every_broken_habit_is_seen(source):
    assert len(problems(source)) >= 1
    assert not problems("try:\n    torch.load(path, weights_only=True)\nexcept OSError:\n    pass")

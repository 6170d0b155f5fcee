"""Flags: fields of frozen dataclasses, declared once with type, range and role; as YAML and on the command line.

What may change on resume, what makes another arm of a comparison and which evaluations are comparable follows from the
role of a flag (:class:`Role`). Standard library, PyYAML and tyro only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro
import yaml

from .shapes import choice

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # of type checkers, which alone know it

Config = TypeVar("Config", bound="DataclassInstance")


@dataclass(frozen=True)
class Role:
    """What a flag is part of, and so where two values of it are one too many."""

    name: str
    resume: bool = False
    """A resumed run must have the same value."""
    branch: bool = False
    """A run that branches from another must have the same value."""
    arm: bool = False
    """Runs with different values are different arms of a comparison, not repetitions."""
    family: bool = False
    """Arms with different values do not lie on one quality-cost curve."""
    match: bool = False
    """`compare` refuses to mix pretraining runs with different values."""
    judged: bool = False
    """Evaluations with different values are not comparable."""


MODEL = Role("model", resume=True, branch=True, arm=True, family=True, match=True, judged=True)
DATA = Role("data", resume=True, branch=True, arm=True, family=True, match=True, judged=True)
IMAGES = Role("images", arm=True, family=True, match=True)
"""Where the images are. They may move: on resume their contents are compared."""
TASK = Role("task", resume=True, branch=True, arm=True, family=True, judged=True)
CURRICULUM = Role("curriculum", resume=True, arm=True, family=True, judged=True)
"""A branch is compared stage by stage."""
LENGTH = Role("length", resume=True, arm=True, judged=True)
PLANNED = Role("planned", arm=True, family=True, judged=True)
"""On resume, what the checkpoint says of the plan is compared: the stages, the step."""
BATCH = Role("batch", judged=True)
"""How a step's batch comes together. Arms, and on resume the stages, have the total batch that results."""
COMPUTE = Role("compute", arm=True, family=True, judged=True)
"""How the arithmetic is done: a resumed run may change it, but seconds and rounding differ."""
SEED = Role("seed", resume=True, branch=True)
"""What differs within an arm."""
WEIGHTS = Role("weights")
"""Which checkpoint is judged."""
UNTRAINED = Role("untrained", resume=True)
"""Which model is trained from random weights."""
EVALUATION = Role("evaluation", judged=True)
RUN = Role("run")
"""Bookkeeping: where and how a run runs, saves and reports."""


@dataclass(frozen=True)
class Range:
    """Legal values of a number, or of each number of a tuple."""

    text: str
    """Completes "--flag must …"."""
    holds: Callable[[float], bool]


FINITE = Range("be finite", math.isfinite)
POSITIVE = Range("be positive and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("be finite and not negative", lambda value: 0 <= value < math.inf)
EPOCHS = Range("be positive and at most 1e9", lambda value: 0 < value <= 1e9)  # or steps would be no 64-bit integers
SHARE = Range("be in [0, 1]", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Range("be in [0, 1)", lambda value: 0 <= value < 1)
SHARE_ABOVE_0 = Range("be in (0, 1]", lambda value: 0 < value <= 1)
SHARE_BETWEEN = Range("be in (0, 1)", lambda value: 0 < value < 1)


@dataclass(frozen=True)
class OneOf:
    """Legal values of a text, or of each text of a tuple."""

    legal: tuple[str, ...]


@functools.cache
def _marks(config_type: type) -> dict[str, tuple[Any, ...]]:
    """What stands beside the type of each field."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    return {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(config_type)}


@functools.cache
def roles(config_type: type) -> dict[str, Role]:
    """Role of each flag. TypeError for a flag that has none, or several."""
    found = {}
    for name, marks in _marks(config_type).items():
        declared = [mark for mark in marks if isinstance(mark, Role)]
        if len(declared) != 1:
            raise TypeError(f"{config_type.__name__}.{name} must declare one Role, not {len(declared)}")
        found[name] = declared[0]
    return found


def names(config_type: type, wanted: Callable[[Role], bool]) -> list[str]:
    """Flags whose role is wanted, in the order of their declaration."""
    return [name for name, role in roles(config_type).items() if wanted(role)]


def check(config: object) -> None:
    """ValueError that names the first flag whose value is out of its range, and what is legal."""
    config_type: type = type(config)
    for name, marks in _marks(config_type).items():
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        for mark in marks:
            for one in (one for one in values if one is not None):
                if isinstance(mark, OneOf):
                    choice(f"--{name}", one, mark.legal)
                elif isinstance(mark, Range) and not mark.holds(one):
                    got = " ".join(map(str, values))
                    raise ValueError(f"--{name} must {mark.text}, got {got}")


# ── the command line ──


def parse(config_type: type[Config], argv: list[str], default_recipe: str = "", prog: str | None = None) -> Config:
    """Command line -> config. `--recipe` gives the defaults; without it and `--data_path`, `default_recipe` does.

    Prints help and exits where it is asked for. Raises ValueError, with one line, for what it can't understand.
    """
    recipe = _flag(argv, "recipe") or ("" if _flag(argv, "data_path") else default_recipe)
    defaults = from_recipe(config_type, recipe) if recipe else None
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return _parse(config_type, argv, defaults, prog)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(message_of(box.getvalue(), "Flags", config_type.__name__)) from None


def _parse(config_type: type[Config], argv: list[str], defaults: Config | None, prog: str | None) -> Config:
    groups = _groups(config_type)
    options = {"args": argv, "prog": prog, "use_underscores": True}
    if not groups:
        return tyro.cli(config_type, **options)

    def as_parsed(group: type) -> Any:
        """A group's declared defaults, before a config completes them, or the recipe's."""
        if defaults is None:
            return group()
        return group(**{f.name: getattr(defaults, f.name) for f in dataclasses.fields(group)})

    # One box of --help for each group: tyro makes them of nested dataclasses.
    nested = dataclasses.make_dataclass(
        "Flags", [(group.group, tyro.conf.OmitArgPrefixes[group], as_parsed(group)) for group in groups], frozen=True
    )
    parsed = tyro.cli(nested, description=config_type.__doc__, **options)
    values = [getattr(parsed, group.group) for group in groups]
    return config_type(**{f.name: getattr(part, f.name) for part in values for f in dataclasses.fields(part)})


def _groups(config_type: type[Any]) -> list[type[Any]]:
    """Base classes with a `group` of their own: boxes of --help, in the order of their fields."""
    if "group" in vars(config_type):
        return [config_type]
    return [group for base in reversed(config_type.__bases__) for group in _groups(base)]


def message_of(box: str, *type_names: str) -> str:
    """The first paragraph of what tyro draws for an error, in one line, with its guess at what was meant.

    tyro has no public way to ask for it. tests/test_flags.py holds this to the boxes of the oldest and newest one.
    Where the output can't show their frames, it draws them in ASCII, with a rule under the title.
    """

    def is_rule(line: str) -> bool:
        return bool(line) and not line.strip("─-+╰╯")

    lines = list(itertools.dropwhile(is_rule, (line.strip("│| ") for line in box.splitlines()[1:])))
    end = next((i for i, line in enumerate(lines) if is_rule(line)), len(lines))
    hint = next((lines[i + 1] for i, line in enumerate(lines[:-1]) if line.startswith("Perhaps you meant")), "")
    message = " ".join(line for line in lines[:end] if line)
    message = re.sub(r"\[/?bold\]", "", message)  # markup that tyro leaves in names of types
    for name in type_names:
        message = message.removeprefix(f"Error parsing {name}: ")
    return message + (f"; perhaps you meant {hint}" if hint else "; see --help")


def _flag(argv: list[str], name: str) -> str:
    """Value of the last --name in a command line, before it is parsed; "" if it is not there."""
    value = ""
    for i, word in enumerate(argv):
        flag, equals, after = word.partition("=")
        if flag.replace("-", "_") == f"__{name}":
            value = after if equals else (argv[i + 1] if i + 1 < len(argv) else "")
    return value


# ── recipes ──


def recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    folder = Path(str(resources.files("mae_et"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def from_recipe(config_type: type[Config], recipe: str, flag: str = "--recipe") -> Config:
    """A shipped recipe by name, or a YAML file. ValueError, which names the flag, lists the shipped ones."""
    shipped = recipes()
    path = Path(recipe)
    if recipe in shipped:
        path = shipped[recipe]
    elif not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise FileNotFoundError(f"{flag}: no file {recipe}")
        choice(flag, recipe, shipped)
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{flag} {path} must be a mapping of configuration keys, see --print_config")
    base, flags = values.get("recipe"), dataclasses.fields(config_type)
    if base and len(values) < len(flags) / 2:  # a run's config.yaml, which names its recipe, has about all
        raise ValueError(
            f"{flag} {path}: a recipe doesn't extend another, `recipe: {base}` would not be read; begin with what "
            f"`--recipe {base} --print_config` prints, or give the changes as flags"
        )
    if values.get("stages") and values.get("curriculum") != "custom":
        raise ValueError(f"{flag} {path}: `stages` are those of `curriculum: custom`; add that, or leave them out")
    return from_dict(config_type, values | {"recipe": recipe}, where=f"recipe {recipe}")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def from_dict(config_type: type[Config], values: dict[str, Any], where: str) -> Config:
    """A plain mapping -> config, with each value checked against its field's type."""
    hints = typing.get_type_hints(config_type)
    fields = {f.name: f for f in dataclasses.fields(config_type)}
    unknown = [key for key in values if key not in fields]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(fields)}"
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; {hint}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    return config_type(**{key: _typed(value, hints[key], f"{where}: {key}") for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Config -> plain values that YAML and safe checkpoints can hold; rows of a curriculum without their blanks."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {k: plain(v) for k, v in dataclasses.asdict(value).items() if v is not None}
        return value

    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def to_yaml(config: Any) -> str:
    """Config as the text of a recipe."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type of a field, or a ValueError that names where. Only the kinds our configs have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        sequence = isinstance(value, (list, tuple))
        for kind in arguments:
            if kind is not type(None) and (typing.get_origin(kind) is tuple) == sequence:
                return _typed(value, kind, where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_typed(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    elif origin is Literal and value in arguments:
        return value
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, dict):
            return from_dict(hint, value, where)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 reads 1e-3, without a point, as text
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where} should be {_name(hint)}, got {value!r}")


def _name(hint: Any) -> str:
    plain = isinstance(hint, type) and not typing.get_args(hint)  # Python 3.10 calls tuple[float] a type, too
    return hint.__name__ if plain else str(hint).replace("typing.", "")

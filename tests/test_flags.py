"""Flags declare their role and range once: the golden list, help in groups, ranges that are kept, tyro's messages."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from importlib import metadata
from pathlib import Path
from typing import Annotated

import pytest

from mae_et.cli import ExportConfig
from mae_et.compare.compare import CompareConfig
from mae_et.data.config import MeasureConfig, PrepareConfig
from mae_et.evaluate.config import FinetuneConfig, ReconstructConfig
from mae_et.plan import flags
from mae_et.plan.config import PretrainConfig
from mae_et.plan.flags import MODEL, POSITIVE, RUN, TASK, OneOf, Range, check, names, parse, roles
from mae_et.plan.report import PlanConfig
from mae_et.plan.shared import LauncherFlags, RunFlags
from mae_et.search.config import SearchConfig

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden_flags.txt"
CONFIGS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "plan": PlanConfig,
    "search": SearchConfig,
    "compare": CompareConfig,
    "reconstruct": ReconstructConfig,
    "prepare": PrepareConfig,
    "measure": MeasureConfig,
    "export": ExportConfig,
}
GROUPED = ("pretrain", "finetune", "plan", "search")


def listed() -> list[str]:
    """`command flag role default`, of every command; those of pretraining once."""
    lines = []
    for command, config_type in CONFIGS.items():
        known = roles(PretrainConfig) if issubclass(config_type, PretrainConfig) and command != "pretrain" else {}
        for field in dataclasses.fields(config_type):
            if field.name not in known:
                default = "required" if field.default is dataclasses.MISSING else repr(field.default)
                lines.append(f"{command} --{field.name} {roles(config_type)[field.name].name} {default}")
    return lines


def test_the_list_of_flags_is_frozen():
    """Adding a flag, or giving it another role or default, is a decision: it must show in a diff of the golden list."""
    now = listed()
    assert now == GOLDEN.read_text().splitlines(), f"if it is meant, write the new list to {GOLDEN.name}"


@pytest.mark.parametrize("command", CONFIGS)
def test_every_flag_has_one_role_and_is_documented(command, capsys):
    config_type = CONFIGS[command]
    assert set(roles(config_type)) == {f.name for f in dataclasses.fields(config_type)}
    with pytest.raises(SystemExit) as stop:
        parse(config_type, ["--help"], prog="prog")
    assert not stop.value.code
    shown = re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out))
    for name in set(roles(config_type)) - {"stages"}:
        assert re.search(rf"--{name}\b|\b{name.upper()}\b|\bSTR\b", shown), name
    # Every flag carries its docstring: nothing stands between a flag and its default.
    assert not re.search(r"--\w+ [A-Z{}|\[\] ]+ \(default", shown)


@pytest.mark.parametrize("command", GROUPED)
def test_help_comes_in_groups(command, capsys):
    groups = flags._groups(CONFIGS[command])
    assert len(groups) >= 7
    fields = [f.name for group in groups for f in dataclasses.fields(group)]
    assert sorted(fields) == sorted(f.name for f in dataclasses.fields(CONFIGS[command])), "each flag in one group"
    with pytest.raises(SystemExit):
        parse(CONFIGS[command], ["--help"], prog="prog")
    shown = capsys.readouterr().out
    places = [re.search(rf"^\W+ {group.group} options ", shown, re.MULTILINE).start() for group in groups]
    assert places == sorted(places)


def test_a_flag_without_a_role_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Forgotten:
        named: Annotated[int, RUN] = 0
        nameless: int = 0

    with pytest.raises(TypeError, match=r"Forgotten\.nameless must declare one Role"):
        roles(Forgotten)

    @dataclasses.dataclass(frozen=True)
    class Torn:
        both: Annotated[int, RUN, TASK] = 0

    with pytest.raises(TypeError, match=r"Torn\.both must declare one Role, not 2"):
        roles(Torn)


def test_the_same_flag_means_the_same_in_both_commands():
    shared = {f.name for base in (RunFlags, LauncherFlags) for f in dataclasses.fields(base)}
    assert len(shared) > 15
    for name in shared:
        assert roles(PretrainConfig)[name] is roles(FinetuneConfig)[name], name


def marked(mark_type: type) -> list[tuple[type, str, object]]:
    found = []
    for config_type in (PretrainConfig, FinetuneConfig):
        for name, marks in flags._marks(config_type).items():
            found += [(config_type, name, mark) for mark in marks if isinstance(mark, mark_type)]
    return found


def with_value(config_type: type, name: str, value: object):
    """A config with one value put in behind the back of its other checks."""
    config = config_type()
    object.__setattr__(config, name, value)
    return config


@pytest.mark.parametrize(("config_type", "name", "mark"), marked(Range), ids=lambda v: v if isinstance(v, str) else "")
def test_every_range_is_kept(config_type, name, mark):
    for value in (-1, 0, 0.5, 1, 2, math.inf, math.nan):
        config = with_value(config_type, name, value)
        if mark.holds(value):
            check(config)
        else:
            with pytest.raises(ValueError, match=rf"^--{name} must {re.escape(mark.text)}, got {value}$"):
                check(config)


@pytest.mark.parametrize(("config_type", "name", "mark"), marked(OneOf), ids=lambda v: v if isinstance(v, str) else "")
def test_every_choice_is_kept(config_type, name, mark):
    for value in mark.legal:
        check(with_value(config_type, name, value))
    with pytest.raises(ValueError, match=rf"^unknown --{name} 'nonsense'.*; choose from {', '.join(mark.legal)}$"):
        check(with_value(config_type, name, "nonsense"))


def test_each_number_of_a_tuple_is_checked():
    @dataclasses.dataclass(frozen=True)
    class Config:
        sizes: Annotated[tuple[int, ...], RUN, POSITIVE] = ()
        kinds: Annotated[tuple[str, ...], RUN, OneOf(("a", "b"))] = ()

    check(Config((1, 2), ("a",)))
    with pytest.raises(ValueError, match=r"^--sizes must be positive and finite, got 1 0$"):
        check(Config((1, 0)))
    with pytest.raises(ValueError, match=r"^unknown --kinds 'c'; choose from a, b$"):
        check(Config((), ("a", "c")))


@pytest.mark.parametrize(
    ("config_type", "name", "value", "legal"),
    [
        (PretrainConfig, "epochs", 1e308, "be positive and at most 1e9, got 1e+308"),
        (FinetuneConfig, "epochs", 1e308, "be positive and at most 1e9, got 1e+308"),
        (FinetuneConfig, "eval_epochs", 1e308, "be positive and at most 1e9, got 1e+308"),
        (FinetuneConfig, "recount", -1, "be positive and finite, got -1"),
        (FinetuneConfig, "color_jitter", -0.4, "be finite and not negative, got -0.4"),
    ],
)
def test_what_only_a_library_would_refuse_is_refused_by_name(config_type, name, value, legal):
    with pytest.raises(ValueError, match=f"^--{name} must {re.escape(legal)}$"):
        check(with_value(config_type, name, value))


def test_names_by_role_in_their_order():
    model = names(PretrainConfig, lambda role: role is MODEL)
    assert model[:4] == ["model", "input_size", "patch_size", "in_chans"]
    assert names(PretrainConfig, lambda role: role.name == "length") == ["epochs", "warmup_epochs", "hold_epochs"]


# ── messages of tyro, whose boxes are recorded from the oldest and the newest version ──

BOXES = json.loads((TESTS / "tyro_boxes.json").read_text())
EXPECTED = {
    "unknown flag, close": r"^Unrecognized options: --mask_ratoi(, 0\.5)?; perhaps you meant --mask_ratio FLOAT$",
    "unknown flag": r"^Unrecognized options: --nonsense(, 3)?; see --help$",
    "wrong type": r"^Error parsing --batch_size: .*'many'; see --help$",
    "no value": r"^(Missing value for argument '--batch_size'|Argument --batch_size: expected 1 argument).*see --help$",
    "too many values": r"^Unrecognized (options|arguments): 0\.3; see --help$",
    "missing positional": r"^(Missing from main_pretrain.py: STR .*|.*are required: STR); see --help$",
    "value of a switch": r"^Unrecognized (options|arguments): yes; see --help$",
}


def without_unicode(box: str, side: str) -> str:
    """A box as it is drawn where the output is not UTF-8: the title above a rule, frames in ASCII or left out."""
    title, *lines = box.translate(str.maketrans("│─╭╮╰╯", f"{side}-++++")).strip().splitlines()
    return "\n".join([f" {title.strip('+- ')} ", f" {'-' * (len(title) - 2)} ", *lines, ""])


@pytest.mark.parametrize("version", BOXES)
@pytest.mark.parametrize("case", EXPECTED)
def test_recorded_boxes_give_one_line(version, case):
    box = BOXES[version][case]
    for drawn in (box, without_unicode(box, " "), without_unicode(box, "|")):
        assert re.search(EXPECTED[case], flags.message_of(drawn, "Flags", "PretrainConfig"))


def test_the_oldest_tyro_allowed_is_recorded():
    oldest = min(BOXES, key=lambda version: [int(part) for part in version.split(".")])
    requirements = (TESTS.parent / "requirements.txt").read_text()
    assert f"tyro>={oldest}" in requirements


def test_the_installed_tyro_gives_one_line_too():
    data = ["--data_path", "D"]
    argvs = {
        "unknown flag, close": [*data, "--mask_ratoi", "0.5"],
        "wrong type": [*data, "--batch_size", "many"],
        "no value": [*data, "--batch_size"],
        "value of a switch": [*data, "--compile", "yes"],
    }
    for case, argv in argvs.items():
        with pytest.raises(ValueError, match=EXPECTED[case]) as error:
            parse(PretrainConfig, argv, prog="main_pretrain.py")
        assert "\n" not in str(error.value), metadata.version("tyro")

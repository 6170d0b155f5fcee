"""Command lines: `main_pretrain.py`, `main_finetune.py` and `python -m mae_et COMMAND`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import tyro

from .checkpoint import read_pretrained, write_export
from .compare.compare import CompareConfig, compare
from .compare.report import notes, terminal_tables, write_report
from .console import console, logging_to_console
from .data.prepare import PrepareConfig, prepare
from .engine.pretrain import pretrain
from .evaluate.config import FinetuneConfig
from .evaluate.finetune import finetune
from .evaluate.probe import probe
from .evaluate.reconstruct import ReconstructConfig, reconstruct
from .files import CheckpointError
from .plan.config import PretrainConfig
from .plan.flags import parse, to_yaml
from .plan.report import PlanConfig, plan_report, plan_summary, plan_table
from .plan.scaling import scaling_table
from .search.report import candidate_table, describe, write_found
from .search.search import search
from .search.space import SearchConfig

#: Mistakes and mishaps that one line explains; anything else is a bug and shows its traceback.
EXPLAINED = (ValueError, OSError, CheckpointError, FloatingPointError)


def main_pretrain(argv: list[str] | None = None) -> None:
    """`python main_pretrain.py`: without flags, the recipe `demo`."""
    _explain("main_pretrain.py", lambda: _pretrain(sys.argv[1:] if argv is None else argv))


def main_finetune(argv: list[str] | None = None) -> None:
    """`python main_finetune.py`: fine-tuning, or the evaluation that a flag asks for."""
    _explain("main_finetune.py", lambda: _finetune(sys.argv[1:] if argv is None else argv))


def _finetune(argv: list[str]) -> None:
    config = parse(FinetuneConfig, argv, prog="main_finetune.py")
    if config.linear_probe or config.knn:
        probe(config)
    else:
        finetune(config)


def _pretrain(argv: list[str]) -> None:
    config = parse(PretrainConfig, argv, default_recipe="demo", prog="main_pretrain.py")
    if config.print_config:
        print(to_yaml(config), end="")
    else:
        pretrain(config)


def _plan(argv: list[str]) -> None:
    config = parse(PlanConfig, argv, default_recipe="demo", prog="mae_et plan")
    report = plan_report(config)
    if config.json:
        print(json.dumps(report, indent=1))
        return
    console.print(plan_table(report))
    if "scaling" in report:
        console.print(scaling_table(report["scaling"]))
    for line in plan_summary(report):
        console.print(line, highlight=False, soft_wrap=True)


def _prepare(argv: list[str]) -> None:
    config = parse(PrepareConfig, argv, prog="mae_et prepare")
    with logging_to_console():
        total = prepare(config)
    before, after = (f"{total[name] / 1e6:,.1f} MB" for name in ("source_bytes", "bytes"))
    console.print(
        f"{total['images']:,} images in {config.out}, {total['damaged']:,} damaged ones skipped; {before} → {after}; "
        f"verified. Train with --data_path {config.out}",
        highlight=False,
        soft_wrap=True,
    )


def _reconstruct(argv: list[str]) -> None:
    path = reconstruct(parse(ReconstructConfig, argv, prog="mae_et reconstruct"))
    console.print(f"{path}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class ExportConfig:
    """Write pretrained weights in the layout of another library."""

    source: tyro.conf.Positional[str]
    """A run folder, or anything else that --finetune reads."""
    format: str = "timm"
    """timm (a .safetensors file of the encoder), facebook (a .pth) or huggingface (a folder of ViTMAE)."""
    out: str = ""
    """File, or folder for huggingface; default: beside the run's checkpoint."""
    encoder_only: bool = False
    """Leave out the decoder."""


def _export(argv: list[str]) -> None:
    config = parse(ExportConfig, argv, prog="mae_et export")
    pretrained = read_pretrained(config.source, encoder_only=config.encoder_only)
    names = {"timm": "timm.safetensors", "facebook": "facebook.pth", "huggingface": "huggingface"}
    source = Path(config.source)
    folder = source if source.is_dir() else source.parent
    out = Path(config.out) if config.out else folder / names.get(config.format, "")
    write_export(pretrained, pretrained.shape, config.format, out, encoder_only=config.encoder_only)
    console.print(f"{pretrained.origin} → {out}", highlight=False, soft_wrap=True)


def _compare(argv: list[str]) -> None:
    config = parse(CompareConfig, argv, prog="mae_et compare")
    report = compare(config)
    paths = write_report(report, Path(config.out)) if config.out else []
    if config.json:
        print(json.dumps(report, indent=1))
        return
    for table in terminal_tables(report):
        console.print(table)
    for line in (*notes(report), *(f"written: {path}" for path in paths)):
        console.print(line, highlight=False, soft_wrap=True)


def _search(argv: list[str]) -> None:
    config = parse(SearchConfig, argv, default_recipe="demo", prog="mae_et search")
    with logging_to_console():
        found = search(config)
    if found is None:
        return
    paths = write_found(found)
    console.print(candidate_table(found))
    for line in (f"found: {describe(found.schedule)}", *(f"written: {path}" for path in paths)):
        console.print(line, highlight=False, soft_wrap=True)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "pretrain": (_pretrain, "pretrain, as main_pretrain.py does"),
    "finetune": (_finetune, "fine-tune, probe or evaluate, as main_finetune.py does"),
    "plan": (_plan, "print what a configuration will cost, before any training"),
    "compare": (_compare, "compare what runs cost and gave, and what the baseline would have needed"),
    "export": (_export, "write pretrained weights for timm, facebookresearch/mae or transformers"),
    "prepare": (_prepare, "pack images once into shards that are quick to read"),
    "search": (_search, "search a curriculum for these data"),
    "reconstruct": (_reconstruct, "draw what a checkpoint reconstructs"),
}


def main(argv: list[str] | None = None) -> None:
    """`python -m mae_et COMMAND …`, also installed as `mae-et`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return _explain(f"mae_et {argv[0]}", lambda: COMMANDS[argv[0]][0](argv[1:]))
    usage = "usage: python -m mae_et COMMAND …\n" + "".join(f"  {n:12} {text}\n" for n, (_, text) in COMMANDS.items())
    if argv and argv[0] in ("-h", "--help"):
        print(usage + "COMMAND --help lists its flags.")
        return None
    problem = f"unknown command {argv[0]!r}" if argv else "a command is missing"
    fail(f"{problem}; choose from {', '.join(COMMANDS)}", "mae_et")


def _explain(prog: str, run: Callable[[], None]) -> None:
    """Run; a mistake ends in one line on standard error and exit code 1."""
    try:
        run()
    except torch.OutOfMemoryError:
        fail("the device is out of memory: lower --batch_size and set --total_batch_size to keep the total", prog)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except EXPLAINED as error:
        fail(str(error), prog)


def fail(message: str, prog: str) -> NoReturn:
    """One line on standard error, exit code 1."""
    # An error from a loader process carries that process's traceback; its last line is the message.
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(1)

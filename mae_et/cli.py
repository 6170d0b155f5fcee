"""Command lines: `main_pretrain.py`, `main_finetune.py` and `python -m mae_et COMMAND`.

What a command needs is imported when it runs: --help, a wrong flag and a plan don't wait for torch.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import tyro

from .console import console, logging_to_console
from .files import CheckpointError, make_folder
from .hub import check_repository
from .plan.flags import POSITIVE, RUN, WEIGHTS, check, parse, to_yaml

if TYPE_CHECKING:
    from .plan.config import PretrainConfig

#: Mistakes and mishaps that one line explains; anything else is a bug and shows its traceback.
EXPLAINED = (ValueError, OSError, CheckpointError, FloatingPointError)


def main_pretrain(argv: list[str] | None = None) -> None:
    """`python main_pretrain.py`: without flags, the recipe `demo`."""
    explain("main_pretrain.py", lambda: _pretrain(sys.argv[1:] if argv is None else argv))


def main_finetune(argv: list[str] | None = None) -> None:
    """`python main_finetune.py`: fine-tuning, or the evaluation that a flag asks for."""
    explain("main_finetune.py", lambda: _finetune(sys.argv[1:] if argv is None else argv))


def _pretrain(argv: list[str]) -> None:
    from .plan.config import PretrainConfig

    config = parse(PretrainConfig, argv, default_recipe="demo", prog="main_pretrain.py")
    if _printed(config):
        return
    from .engine.pretrain import pretrain

    pretrain(config)


def _printed(config: PretrainConfig) -> bool:
    """Print the configuration as a recipe, if --print_config asks for that alone."""
    if config.print_config:
        print(to_yaml(replace(config, print_config=False)), end="")
    return config.print_config


def _finetune(argv: list[str]) -> None:
    from .evaluate.config import FinetuneConfig

    config = parse(FinetuneConfig, argv, prog="main_finetune.py")
    if config.is_probe:
        from .evaluate.probe import probe

        probe(config)
    else:
        from .evaluate.finetune import finetune

        finetune(config)


def _plan(argv: list[str]) -> None:
    from .plan.config import PretrainConfig
    from .plan.report import PlanConfig, plan_report, plan_summary, plan_table, scaling_table

    config = parse(PlanConfig, argv, default_recipe="demo", prog="mae_et plan")
    if _printed(PretrainConfig(**{f.name: getattr(config, f.name) for f in fields(PretrainConfig)})):
        return
    from .data.sources import count_images

    report = plan_report(config, count_images)
    if config.json:
        print(json.dumps(report, indent=1))
        return
    console.print(plan_table(report))
    if "scaling" in report:
        console.print(scaling_table(report["scaling"]))
    for line in plan_summary(report):
        console.print(line, soft_wrap=True)


def _prepare(argv: list[str]) -> None:
    from .data.config import PrepareConfig

    config = parse(PrepareConfig, argv, prog="mae_et prepare")
    from .data.prepare import prepare

    with logging_to_console():
        total = prepare(config)
    before, after = (f"{total[name] / 1e6:,.1f} MB" for name in ("source_bytes", "bytes"))
    console.print(
        f"{total['images']:,} images in {config.out}, {total['damaged']:,} damaged ones skipped; {before} -> {after}; "
        f"verified. Train with --data_path {config.out}",
        soft_wrap=True,
    )


def _measure(argv: list[str]) -> None:
    from .data.config import MeasureConfig

    config = parse(MeasureConfig, argv, prog="mae_et measure")
    from .data.measure import describe, measure

    if config.json:
        print(json.dumps(measure(config.data_path), indent=1))
        return
    with logging_to_console():
        report = measure(config.data_path)
    for line in describe(report):
        console.print(line, soft_wrap=True)


def _reconstruct(argv: list[str]) -> None:
    from .evaluate.config import ReconstructConfig

    config = parse(ReconstructConfig, argv, prog="mae_et reconstruct")
    from .evaluate.reconstruct import reconstruct

    with logging_to_console():
        path = reconstruct(config)
    console.print(f"{path}", soft_wrap=True)


#: What each format of `export` is, and the suffixes that its file may have.
EXPORTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "timm": ("a folder, or a .safetensors file", (".safetensors",)),
    "facebook": ("a .pth file", (".pth", ".pt")),
    "huggingface": ("a folder", ()),
}


@dataclass(frozen=True)
class ExportConfig:
    """Write pretrained weights in the layout of another library."""

    source: Annotated[str, WEIGHTS, tyro.conf.Positional]
    """A run folder, or anything else that --finetune reads."""
    format: Annotated[str, RUN] = "timm"
    """timm (a folder with a model card), facebook (a .pth) or huggingface (a folder of ViTMAE)."""
    out: Annotated[str, RUN] = ""
    """Folder, or file for facebook; for timm a .safetensors file of the encoder, too. Default: in the run folder."""
    encoder_only: Annotated[bool, RUN] = False
    """Leave out the decoder, and the classifier of a fine-tuned model."""
    num_heads: Annotated[int | None, RUN, POSITIVE] = None
    """Heads of the encoder, for weights that don't say; default: what is usual for its width, with a warning."""
    license: Annotated[str, RUN] = ""
    """Licence of the weights for their model card, as the hub names it: mit, apache-2.0, cc-by-nc-4.0 …"""
    push: Annotated[str, RUN] = ""
    """ORG/NAME: upload timm's folder to this repository of the Hugging Face hub."""

    def __post_init__(self) -> None:
        check(self)
        if self.push:
            check_repository(f"--push {self.push}", self.push)
            if self.format != "timm" or self.out.endswith(".safetensors"):
                raise ValueError("--push uploads the folder of --format timm; drop --push, or the other format or file")
        written, suffixes = EXPORTED.get(self.format, ("", ()))
        if written and Path(self.out).suffix in {".safetensors", ".pth", ".pt", ".bin"} - set(suffixes):
            raise ValueError(f"--out {self.out}: --format {self.format} writes {written}")


def _export(argv: list[str]) -> None:
    config = parse(ExportConfig, argv, prog="mae_et export")
    from .checkpoint import read_pretrained, write_export
    from .engine.run_folder import run_of
    from .hub import push

    with logging_to_console():
        pretrained = read_pretrained(config.source, config.encoder_only, config.num_heads)
        heads = pretrained.shape.num_heads
        if config.num_heads not in (None, heads):
            raise ValueError(f"--num_heads {config.num_heads}: {config.source} has {heads}; leave it out")
        names = {"timm": "timm", "facebook": "facebook.pth", "huggingface": "huggingface"}
        source = Path(config.source)
        folder = source if source.is_dir() else source.parent if source.exists() else Path()
        out = Path(config.out) if config.out else folder / names.get(config.format, "")
        about = {"run": run_of(source), "license": config.license, "name": config.push and f"hf-hub:{config.push}"}
        write_export(pretrained, pretrained.shape, config.format, out, encoder_only=config.encoder_only, **about)
    console.print(f"{pretrained.origin} -> {out}", soft_wrap=True)
    if config.push:
        console.print(f"{out} -> {push(out, config.push)}", soft_wrap=True)


def _compare(argv: list[str]) -> None:
    from .compare.compare import CompareConfig, compare

    config = parse(CompareConfig, argv, prog="mae_et compare")
    from rich.text import Text

    from .compare.report import notes, terminal_tables, write_report
    from .compare.words import verdict

    report = compare(config)
    if config.out:
        make_folder(Path(config.out), "--out")
    paths = write_report(report, Path(config.out)) if config.out else []
    if config.json:
        print(json.dumps(report, indent=1))
        return
    for head, sentences in verdict(report):
        console.print(Text("\n  ").join([Text(head, "bold"), *map(Text, sentences)]), soft_wrap=True)
    for table in terminal_tables(report):
        console.print(table)
    for line in (*notes(report), *(f"written: {path}" for path in paths)):
        console.print(line, soft_wrap=True)


def _search(argv: list[str]) -> None:
    from .search.config import SearchConfig

    config = parse(SearchConfig, argv, default_recipe="demo", prog="mae_et search")
    if _printed(config):
        return
    from .search.report import candidate_table, describe, write_search
    from .search.search import search

    with logging_to_console():
        result = search(config)
    if result is None:
        return
    paths = write_search(result)
    console.print(candidate_table(result))
    for line in (f"found: {describe(result)}", *(f"written: {path}" for path in paths)):
        console.print(line, soft_wrap=True)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "pretrain": (_pretrain, "pretrain, as main_pretrain.py does"),
    "finetune": (_finetune, "fine-tune, probe or evaluate, as main_finetune.py does"),
    "plan": (_plan, "print what a configuration will cost, before any training"),
    "compare": (_compare, "compare what runs cost and gave, and what the baseline would have needed"),
    "export": (_export, "write pretrained weights for timm, facebookresearch/mae or transformers"),
    "prepare": (_prepare, "pack images once into shards that are quick to read"),
    "measure": (_measure, "say what a data set holds, and how to pretrain on it"),
    "search": (_search, "search a curriculum for these data"),
    "reconstruct": (_reconstruct, "draw what a checkpoint reconstructs"),
}


def main(argv: list[str] | None = None) -> None:
    """`python -m mae_et COMMAND …`, also installed as `mae-et`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return explain(f"mae_et {argv[0]}", lambda: COMMANDS[argv[0]][0](argv[1:]))
    usage = "usage: python -m mae_et COMMAND …\n" + "".join(f"  {n:12} {text}\n" for n, (_, text) in COMMANDS.items())
    if argv and argv[0] in ("-h", "--help"):
        return explain("mae_et", lambda: print(usage + "COMMAND --help lists its flags."))
    problem = f"unknown command {argv[0]!r}" if argv else "a command is missing"
    fail(f"{problem}; choose from {', '.join(COMMANDS)}", "mae_et")


def explain(prog: str, run: Callable[[], None]) -> None:
    """Run; a mistake ends in one line on standard error and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a character that its encoding lacks is no reason to fail
    try:
        run()
    except KeyboardInterrupt:
        # Not SystemExit(130): ending by the signal itself, a process ends the loop of a shell script around it, too.
        sys.excepthook = lambda *_: None
        raise
    except BrokenPipeError:  # `… --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at its exit
        raise SystemExit(1) from None
    except EXPLAINED as error:
        fail(str(error), prog)
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        fail("the device is out of memory: lower --batch_size and set --total_batch_size to keep the total", prog)


def fail(message: str, prog: str) -> NoReturn:
    """One line on standard error, exit code 1."""
    # An error from a loader process carries that process's traceback; its last line is the message.
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(1)

"""What a search has found: a recipe that says how it was found, a table of the candidates, and their picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from rich.table import Table

from ..compare.report import COLOURS
from ..engine import run_folder
from ..plan.flags import to_yaml
from .search import PICTURE, RECIPE, Found
from .space import Option, Schedule

PANELS_ACROSS = 4
PANEL_INCHES = (2.6, 2.8)


def write_found(found: Found) -> list[Path]:
    """recipe.yaml and candidates.png in the search's folder; returns their paths."""
    out = Path(found.space.config.output_dir)
    run_folder.write_text(out / RECIPE, recipe(found))
    if found.rounds:
        figure = draw_candidates(found)
        figure.savefig(out / PICTURE, dpi=110, metadata={"Software": None})
        plt.close(figure)
    return [out / RECIPE, *([out / PICTURE] if found.rounds else [])]


def recipe(found: Found) -> str:
    """The text of a recipe, with a header that says how it was found, on what, and at what cost."""
    space, config = found.space, found.space.config
    command = f"python main_pretrain.py --recipe {RECIPE}"
    lines = [
        f"Found by `python -m mae_et search --algorithm {config.algorithm}`: {describe(found.schedule)}.",
        f"Data: {config.data_path}, {space.num_images:,} training images; judged by {' and '.join(config.judge)} on "
        f"{config.holdout:,} others.",
        f"Candidates: {space.sizes} px, {config.num_stages} stages; a vanilla run of {config.epochs:g} epochs is "
        f"{space.vanilla_flops:.3g} FLOPs.",
        f"Cost of the search: {len(found.results.by_name)} trials, {found.cost:.2f} vanilla runs, {found.hours:.2g} h.",
        "Scores, mean ± standard deviation over seeds (* chosen or taken further):"
        if config.num_seeds > 1
        else "Scores, one seed, so of unknown spread (* chosen or taken further):",
        *(f"  {line}" for line in score_lines(found)),
        f"Command: {command}",
    ]
    return "".join(f"# {line}\n" for line in lines) + to_yaml(found.config)


def describe(schedule: Schedule) -> str:
    """16 px 20 % · 32 px 80 %."""
    return " · ".join(f"{option} px {share:.0%}" for option, share in schedule)


def score_lines(found: Found) -> list[str]:
    """A line for every round: its candidates with their scores."""
    return [
        f"{i + 1}. " + "; ".join(f"{label(s)} {show(v)}{'*' if s in taken else ''}" for s, v in scores.items())
        for i, (scores, taken) in enumerate(zip(found.rounds, found.taken, strict=True))
    ]


def candidate_table(found: Found) -> Table:
    """All candidates that were judged, round by round."""
    table = Table(title="Candidates", title_justify="left")
    for head in ("round", "schedule", "score", "seeds", "vanilla runs", "taken"):
        table.add_column(head, justify="left" if head == "schedule" else "right")
    for i, (scores, taken) in enumerate(zip(found.rounds, found.taken, strict=True)):
        for schedule, values in scores.items():
            cost = len(values) * found.space.cost(schedule)
            mark = "*" if schedule in taken else ""
            table.add_row(str(i + 1), label(schedule), show(values), str(len(values)), f"{cost:.2f}", mark)
        table.add_section()
    return table


def label(schedule: Schedule) -> str:
    """16→20→32, the sizes of a schedule, with target and operator where a search chooses them."""
    return "→".join(str(option) for option, _ in schedule)


def show(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def draw_candidates(found: Found):
    """A panel for each round: the size that was tried against the score, a dot per seed, the chosen one filled."""
    rounds, taken = found.rounds, found.taken
    across = min(PANELS_ACROSS, len(rounds))
    down = math.ceil(len(rounds) / across)
    size = (PANEL_INCHES[0] * across + 0.6, PANEL_INCHES[1] * down + 0.3)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, sharey=True, layout="constrained")
    colours = {option: COLOURS[i % len(COLOURS)] for i, option in enumerate(_tried(found))}
    for ax in axes.flat[len(rounds) :]:
        ax.set_visible(False)
    for i, (ax, scores) in enumerate(zip(axes.flat, rounds, strict=False)):
        for x, (schedule, values) in enumerate(scores.items()):
            colour, chosen = colours[_last(schedule)], schedule in taken[i]
            ax.plot([x] * len(values), values, "o", color=colour, mfc=colour if chosen else "none", alpha=0.6, ms=5)
            ax.plot([x - 0.25, x + 0.25], [statistics.fmean(values)] * 2, "-", color=colour, lw=3 if chosen else 1.5)
        ax.set_xticks(range(len(scores)), [_kind(schedule) for schedule in scores], fontsize=8, rotation=45)
        ax.set_xlim(-0.6, len(scores) - 0.4)
        ax.set_title(f"round {i + 1}", fontsize=9)
        ax.grid(axis="y", alpha=0.3)
        if i % across == 0:
            ax.set_ylabel(f"{' + '.join(found.space.config.judge)}, held out")
    figure.supxlabel("size of the stage that is tried (px); thick: taken", fontsize=9)
    return figure


def _last(schedule: Schedule) -> Option:
    """What a round tried: the last stage of a trunk; of a whole run, which ends at full size, the one before."""
    whole = math.isclose(sum(share for _, share in schedule), 1.0)
    return schedule[-2 if whole and len(schedule) > 1 else -1][0]


def _kind(schedule: Schedule) -> str:
    option = _last(schedule)
    extra = "" if (option.target, option.lowfreq) == ("pixel", "fourier") else f"\n{option.target} {option.lowfreq}"
    return f"{option}{extra}"


def _tried(found: Found) -> list[Option]:
    return list(dict.fromkeys(_last(schedule) for scores in found.rounds for schedule in scores))

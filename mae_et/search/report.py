"""Result of a search: a recipe that says how it was found, a table of the candidates, and their picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..compare.figures import COLOURS
from ..console import WideTable
from ..files import write_text
from ..plan.flags import to_yaml
from .search import PICTURE, RECIPE, SearchResult
from .space import Option, Schedule

PANELS_ACROSS = 4
PANEL_INCHES = (2.6, 2.8)


def write_search(result: SearchResult) -> list[Path]:
    """Write recipe.yaml and candidates.png in the search's folder; returns their paths."""
    out = Path(result.space.config.output_dir)
    write_text(out / RECIPE, recipe(result))
    if not result.rounds:
        return [out / RECIPE]
    figure = draw_candidates(result)
    figure.savefig(out / PICTURE, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return [out / RECIPE, out / PICTURE]


def recipe(result: SearchResult) -> str:
    """The text of a recipe, with a header that says how it was found, on what, and at what cost."""
    space, config = result.space, result.space.config
    command = f"python main_pretrain.py --recipe {RECIPE}"
    lines = [
        f"Found by `python -m mae_et search --algorithm {config.algorithm}`: {describe(result)}.",
        f"Data: {config.data_path}, {space.num_images:,} training images; judged by {' and '.join(config.judge)} on "
        f"{config.holdout:,} others.",
        f"Candidates: {space.sizes} px, {config.num_stages} stages; a vanilla run of {config.epochs:g} epochs is "
        f"{space.vanilla_flops:.3g} FLOPs.",
        f"Cost of the search: {len(result.results.by_name)} trials, {result.cost:.2f} vanilla runs, "
        f"{result.hours:.2g} h.",
        "Scores, mean ± standard deviation over seeds (* chosen or taken further):"
        if config.num_seeds > 1
        else "Scores, one seed, so of unknown spread (* chosen or taken further):",
        *(f"  {line}" for line in score_lines(result)),
        f"Command: {command}",
    ]
    return "".join(f"# {line}\n" for line in lines) + to_yaml(result.config)


def describe(result: SearchResult) -> str:
    """16 px 20 % · 32 px 80 %, with target and operator where a search chooses them."""
    stages = " · ".join(f"{option} px {share:.0%}" for option, share in result.schedule)
    return f"{stages} {result.space.kind(result.schedule[0][0])}".rstrip()


def score_lines(result: SearchResult) -> list[str]:
    """A line for every round: its candidates with their scores."""
    label = result.space.label
    return [
        f"{i + 1}. " + "; ".join(f"{label(s)} {show(v)}{'*' if s in selected else ''}" for s, v in scores.items())
        for i, (scores, selected) in enumerate(zip(result.rounds, result.selected, strict=True))
    ]


def candidate_table(result: SearchResult) -> WideTable:
    """All candidates that were evaluated, round by round."""
    heads = ("round", "schedule", "score", "seeds", "vanilla runs", "selected")
    rows = []
    for i, (scores, selected) in enumerate(zip(result.rounds, result.selected, strict=True)):
        for schedule, values in scores.items():
            cost = len(values) * result.space.cost(schedule)
            mark = "*" if schedule in selected else ""
            rows.append((str(i + 1), result.space.label(schedule), show(values), str(len(values)), f"{cost:.2f}", mark))
    return WideTable("Candidates", heads, rows, left=heads[1:2], keys=2)


def show(values: list[float]) -> str:
    """Mean of the seeds, and their standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def draw_candidates(result: SearchResult) -> Figure:
    """A panel for each round: the size that was tried against the score, a dot per seed, the selected one filled."""
    rounds = result.rounds
    columns = min(PANELS_ACROSS, len(rounds))
    rows = math.ceil(len(rounds) / columns)
    size = (PANEL_INCHES[0] * columns + 0.6, PANEL_INCHES[1] * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    options = dict.fromkeys(tried_option(schedule) for scores in rounds for schedule in scores)
    colours = {option: COLOURS[i % len(COLOURS)] for i, option in enumerate(options)}
    for ax in axes.flat[len(rounds) :]:
        ax.set_visible(False)
    for i, (ax, scores) in enumerate(zip(axes.flat, rounds, strict=False)):
        for x, (schedule, values) in enumerate(scores.items()):
            colour, selected = colours[tried_option(schedule)], schedule in result.selected[i]
            ax.plot([x] * len(values), values, "o", color=colour, mfc=colour if selected else "none", alpha=0.6, ms=5)
            ax.plot([x - 0.25, x + 0.25], [statistics.fmean(values)] * 2, "-", color=colour, lw=3 if selected else 1.5)
        ticks = [f"{option}\n{result.space.kind(option)}".rstrip() for option in map(tried_option, scores)]
        ax.set_xticks(range(len(scores)), ticks, fontsize=8, rotation=45)
        ax.set_xlim(-0.6, len(scores) - 0.4)
        ax.set_title(f"round {i + 1}", fontsize=9)
        ax.grid(axis="y", alpha=0.3)
        if i % columns == 0:
            ax.set_ylabel(f"{' + '.join(result.space.config.judge)}, held out")
    figure.supxlabel("size of the stage that is tried (px); thick: selected", fontsize=9)
    return figure


def tried_option(schedule: Schedule) -> Option:
    """What a round tried: the last stage of a base run; of a whole run, which ends at full size, the one before."""
    is_whole = math.isclose(sum(share for _, share in schedule), 1.0)
    return schedule[-2 if is_whole and len(schedule) > 1 else -1][0]

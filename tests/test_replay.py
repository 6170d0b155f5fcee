"""Replay and several views through the real engine: what is resumed, refused, planned and booked; and what helps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import write_photos

from mae_et import checkpoint
from mae_et.data.sources import count_images
from mae_et.engine import storage
from mae_et.engine.logger import data_wait_hints
from mae_et.engine.pretrain import pretrain
from mae_et.plan.build import build_curriculum
from mae_et.plan.config import PretrainConfig
from mae_et.plan.cost import Ledger, StageCost
from mae_et.plan.curriculum import Curriculum, Stage
from mae_et.plan.flags import from_dict
from mae_et.plan.report import PlanConfig, plan_report, plan_summary

TINY = {
    **{"model": "mae_vit_tiny_patch16", "input_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    **{"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "epochs": 8, "warmup_epochs": 0.5},
    **{"batch_size": 8, "num_workers": 0, "precision": "fp32", "lr": 1e-3, "device": "cpu", "print_steps": 1},
    "curriculum": "custom",
    "stages": [{"size_px": 16, "share": 0.5, "replay": 4}, {"size_px": 32, "share": 0.5}],
    "lowfreq": "lanczos",
    "views_per_image": 2,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("images"), 16)


def tiny(photos: Path, out: Path, **changes) -> PretrainConfig:
    return from_dict(PretrainConfig, TINY | {"data_path": str(photos), "output_dir": str(out)} | changes, "test")


def test_a_run_with_replay_resumes_bit_for_bit(photos, tmp_path, monkeypatch):
    """Saved amid a stage that replays, when the buffer is full; the resumed run starts with an empty one."""
    save = storage.save

    def save_a_copy(state: dict, path: Path, *keep) -> None:
        save(state, path, *keep)
        path.with_name(f"step-{state['step']}.pt").write_bytes(path.read_bytes())

    monkeypatch.setattr(storage, "save", save_a_copy)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pretrain(tiny(photos, whole, save_steps=21))
    pretrain(tiny(photos, resumed, resume=str(whole / "step-21.pt"), batch_size=4, total_batch_size=8, num_workers=1))
    a = checkpoint.load(whole / "checkpoint.pt")
    losses = [
        [json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, resumed)
    ]
    assert losses[1][:21] == losses[0][:21]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # micro-batches add up in another order

    again = tmp_path / "again"
    pretrain(tiny(photos, again, resume=str(whole / "step-21.pt")))
    c = checkpoint.load(again / "checkpoint.pt")
    assert all(torch.equal(c["model"][key], a["model"][key]) for key in a["model"])

    ledger = json.loads((again / "ledger.json").read_text())
    plan = build_curriculum(tiny(photos, whole), 16)
    counts = [(s["images"], s["decoded_images"], s["replay_bytes"]) for s in ledger["stages"]]
    assert counts == [(s.images, s.decoded_before(s.steps), s.replay_bytes) for s in plan.stages]
    assert ledger["total"]["decoded_images"] == plan.decoded_images < ledger["total"]["images"] / 2.5
    other = [{"size_px": 16, "share": 0.5}, {"size_px": 32, "share": 0.5}]
    with pytest.raises(ValueError, match="stages was"):
        pretrain(tiny(photos, again, resume="auto", stages=other))
    with pytest.raises(ValueError, match="stage of 16 px had replay_depth 8, now 2"):
        pretrain(tiny(photos, again, resume="auto", replay_gib=2 * 8 * 3 * 16 * 16 / 2**30))


def test_the_plan_states_the_buffer(photos, tmp_path):
    values = TINY | {"data_path": str(photos), "output_dir": str(tmp_path)}
    report = plan_report(from_dict(PlanConfig, values, "test"), count_images)
    small, full = report["stages"]
    depth = -(-small["steps"] // 4)  # no deeper than the stage can use
    assert (small["replay"], small["replay_bytes"]) == (4, depth * 8 * 3 * 16 * 16)
    assert (full["replay"], full["replay_bytes"]) == (1, 0)
    assert any("shows each decoded sample in 4 steps" in line for line in plan_summary(report))
    assert any(f"{report['totals']['decoded_images']:,} images are decoded" in line for line in plan_summary(report))
    # Fourier crops stay at full size until they are on the device.
    report = plan_report(
        from_dict(PlanConfig, values | {"lowfreq": "fourier", "replay_gib": 1e-4}, "test"), count_images
    )
    assert report["stages"][0]["replay_bytes"] == 4 * 8 * 3 * 32 * 32 <= 1e-4 * 2**30 < 5 * 8 * 3 * 32 * 32
    plain = plan_report(
        from_dict(PlanConfig, values | {"stages": [], "curriculum": "et_pp", "views_per_image": 1}, "test"),
        count_images,
    )
    assert "decoded" not in " ".join(plan_summary(plain))


def test_the_flag_replays_as_published():
    for input_size, sizes in ((224, (96, 160, 192, 224)), (112, (48, 80, 96, 112))):
        config = PretrainConfig(curriculum="et_pp_192", replay=True, input_size=input_size, epochs=9)
        plan = build_curriculum(config, 10_000)
        assert [(stage.size_px, stage.replay) for stage in plan.stages] == list(zip(sizes, (4, 2, 1, 1), strict=True))
    config = PretrainConfig(curriculum="et_pp", replay=True, input_size=48, epochs=9)  # 3 patches: 160 px become 48
    assert [(s.size_px, s.replay) for s in build_curriculum(config, 10_000).stages] == [(32, 4), (48, 1), (48, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay_gib": 1e-9}, "--replay_gib 1e-09 is less than one step of the stage of 16 px"),
        ({"views_per_image": 3}, "batch of 8 is no multiple of views_per_image × masks_per_image = 3"),
        (
            {"views_per_image": 2, "masks_per_image": 2, "batch_size": 6, "total_batch_size": 8},
            "--batch_size 6 must be",
        ),
        ({"masks_per_image": 0}, "--masks_per_image must be positive"),
        ({"stages": [{"size_px": 16, "share": 0.5, "replay": 0}, {"size_px": 32, "share": 0.5}]}, "replay must be 1"),
    ],
)
def test_what_does_not_fit_is_said(photos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build_curriculum(tiny(photos, tmp_path, **changes), 16)


def test_ranks_share_out_whole_images(photos, tmp_path):
    config = tiny(photos, tmp_path, batch_size=2, total_batch_size=8)
    assert build_curriculum(config, 16, devices=4).decoded_images == build_curriculum(config, 16).decoded_images
    with pytest.raises(ValueError, match="total batch / devices"):
        build_curriculum(replace(config, total_batch_size=6), 16, devices=2)
    rows = [{"size_px": 16, "share": 0.5, "batch_size": 6}, {"size_px": 32, "share": 0.5}]
    config = tiny(photos, tmp_path, stages=rows)
    assert [stage.batch_size for stage in build_curriculum(config, 16).stages] == [6, 8]
    with pytest.raises(ValueError, match="devices of the stage of 16 px, 3 must be a multiple of 2"):
        build_curriculum(replace(config, total_batch_size=8), 16, devices=2)


def test_a_stage_that_waits_is_told_what_helps(caplog):
    plan = Curriculum((Stage(96, 9, 27, 8, 10, 1.0), Stage(224, 49, 147, 8, 10, 1.0)), 100)
    config = PretrainConfig(curriculum="et_pp")
    fast, slow = ({"train_seconds": 9.5, "data_seconds": d} for d in (1.0, 9.5))
    ledger = Ledger([StageCost(96, **slow), StageCost(224, **fast)])
    (line,) = data_wait_hints(config, plan, ledger, is_jpeg=True, spare_cores=6)
    assert "stage 1, 96 px, waited for data 50%" in line
    assert all(
        word in line for word in ("--num_workers (6", "--lowfreq scaled", "--replay", "--views_per_image", "prepare")
    )
    (line,) = data_wait_hints(replace(config, lowfreq="scaled"), plan, ledger, is_jpeg=True, spare_cores=0)
    assert "--num_workers" not in line and "scaled" not in line and "--replay" in line
    large = Curriculum((Stage(192, 36, 108, 8, 10, 1.0),), 100)  # which --replay doesn't replay
    (line,) = data_wait_hints(config, large, Ledger([StageCost(192, **slow)]), is_jpeg=True, spare_cores=0)
    assert "--replay" not in line and "scaled" in line
    (line,) = data_wait_hints(
        config, plan, Ledger([StageCost(96, **fast), StageCost(224, **slow)]), is_jpeg=False, spare_cores=0
    )
    assert "stage 2" in line and "--replay" not in line and "prepare" not in line
    assert not data_wait_hints(
        config, plan, Ledger([StageCost(96, **fast), StageCost(224, **fast)]), is_jpeg=True, spare_cores=6
    )

"""Batches that grow with the devices' room, and hours on paper."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et.data.stream import SampleStream, micro_batches
from mae_et.engine.resume import check_same_run, identity
from mae_et.plan.build import build_curriculum
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import Curriculum, Stage, StageRow
from mae_et.plan.flags import from_recipe
from mae_et.plan.report import Cluster, PlanConfig, plan_report, scaling_report
from mae_et.plan.schedules import LR_SCALINGS, plan_stages

ROWS = (StageRow(96, 0.2), StageRow(160, 0.4), StageRow(224, 0.4))


def planned(**changes) -> Curriculum:
    return plan_stages(ROWS, **{"epochs": 10, "num_images": 100_000, "batch_size": 1024, "devices": 8} | changes)


# ------------------------------------------------------------------------------------------------- early large batch


def test_small_stages_take_as_many_images_as_make_the_same_work():
    plain, grown = planned(), planned(early_large_batch=True)
    assert {stage.batch_size for stage in plain.stages} == {1024}
    work = [stage.batch_size * stage.flops_per_image for stage in grown.stages]
    assert work == pytest.approx([work[-1]] * 3, rel=0.01)
    assert replace(grown.stages[-1], steps=0) == replace(plain.stages[-1], steps=0), "full size is as it was"
    for a, b in zip(plain.stages, grown.stages, strict=True):
        assert b.images == pytest.approx(a.images, abs=grown.stages[0].batch_size), (
            "the images, and so the compute, stay"
        )
        assert b.batch_size % 8 == 0


@settings(max_examples=50)
@given(
    devices=st.integers(1, 64),
    per_device=st.integers(1, 64),
    cap=st.none() | st.integers(1, 20_000),
    scaling=st.sampled_from(sorted(LR_SCALINGS)),
)
def test_any_number_of_devices_gets_whole_images_and_the_cap_holds(devices, per_device, cap, scaling):
    batch = devices * per_device
    grown = planned(early_large_batch=True, batch_size=batch, devices=devices, max_batch_size=cap, lr_scaling=scaling)
    full = grown.stages[-1]
    for stage in grown.stages:
        assert stage.batch_size % devices == 0 and stage.batch_size >= batch
        assert cap is None or stage.batch_size <= max(cap, batch)
        assert stage.batch_size * stage.flops_per_image <= full.batch_size * full.flops_per_image * (1 + 1e-9)
        ratio = stage.batch_size / batch
        assert stage.lr_scale == pytest.approx({"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[scaling])


def test_usual_numbers_of_devices_get_the_same_batches():
    """So that a run can go on on another number."""
    for views in (1, 2):
        grown = {"early_large_batch": True, "batch_size": 4096, "views_per_image": views}
        plans = [planned(devices=devices, **grown).stages for devices in (1, 2, 4, 8, 16, 32, 64 // views)]
        assert all(stages == plans[0] for stages in plans)
    assert planned(devices=6, **grown).stages != plans[0]


def test_who_resumes_on_an_unusual_number_is_told_what_helps():
    config = PretrainConfig(curriculum="et_pp", total_batch_size=4096, early_large_batch=True)
    before, now = (build_curriculum(config, 100_000, devices) for devices in (8, 6))
    state = identity(config, before) | {"optimizer": {}}
    check_same_run(state, config, before, {}, Path("c.pt"))
    with pytest.raises(ValueError, match=r"batch_size 21120, now 21126; with --early_large_batch, go on on as many"):
        check_same_run(state, config, now, {}, Path("c.pt"))


def test_a_row_that_states_its_batch_keeps_it():
    rows = (replace(ROWS[0], batch_size=500, lr_scale=2.0), *ROWS[1:])
    grown = plan_stages(rows, epochs=10, num_images=100_000, batch_size=1024, early_large_batch=True)
    assert (grown.stages[0].batch_size, grown.stages[0].lr_scale) == (500, 2.0)
    assert grown.stages[1].batch_size > 1024
    with pytest.raises(ValueError, match="unknown lr_scaling 'cubic'; choose from sqrt, linear, none"):
        planned(lr_scaling="cubic")


def test_micro_batches_of_small_stages_hold_as_much_work():
    """The total batch stays; it is only cut into fewer, fuller pieces, on every rank as the loader cuts it."""
    plan = planned()
    small, full = plan.stages[0], plan.stages[-1]
    assert full.micro_size(64) == 64 and small.micro_size(64) == int(64 * 196 / 36)
    for rank in range(2):
        pieces = micro_batches(small.batch_size, small.micro_size(64), rank, 2)
        assert sum(map(len, pieces)) == 512 and len(pieces) == 2
        stream = iter(SampleStream(plan, seed=0, micro_size=64, rank=rank, world_size=2))
        assert [len(next(stream)) for _ in pieces] == [len(piece) for piece in pieces]


# -------------------------------------------------------------------------------------------------- scaling on paper


def curriculum() -> Curriculum:
    stages = (
        Stage(96, 9, 27, batch_size=400, steps=36, flops_per_image=1e9),
        Stage(224, 49, 147, batch_size=200, steps=72, flops_per_image=8e9),
    )
    return Curriculum(stages, num_images=1000)


def test_hours_are_what_a_hand_computes():
    cluster = Cluster(devices=4, device_flops=1e12, utilisation=0.5, link=3e8, images_per_second=80.0)
    found = scaling_report(curriculum(), parameters=25_000_000, cluster=cluster)
    small, full = found["stages"]
    assert small["compute_seconds"] == 100 * 1e9 / 0.5e12 == 0.2
    assert small["link_seconds"] == full["link_seconds"] == pytest.approx(2 * 3 / 4 * 1e8 / 3e8) == 0.5
    assert small["data_seconds"] == 100 / 80
    assert full["compute_seconds"] == 50 * 8e9 / 0.5e12 == 0.8
    assert (small["bound"], full["bound"]) == ("data", "compute")
    assert small["hours"] == pytest.approx(36 * 1.25 / 3600) and full["hours"] == pytest.approx(72 * 0.8 / 3600)
    assert found["hours"] == pytest.approx(small["hours"] + full["hours"])
    assert small["images_per_second_needed"] == pytest.approx(100 / 0.5)
    assert full["images_per_second_needed"] == pytest.approx(50 / 0.8)


def test_one_device_sends_nothing_and_unknowns_cost_nothing():
    lonely = Cluster(1, 1e12, 0.5, link=1.0, images_per_second=None)
    for row in scaling_report(curriculum(), 25_000_000, lonely)["stages"]:
        assert (row["link_seconds"], row["data_seconds"], row["bound"]) == (0, 0, "compute")
    free = Cluster(8, 1e12, 0.5)
    assert {row["bound"] for row in scaling_report(curriculum(), 25_000_000, free)["stages"]} == {"compute"}


def test_a_slow_link_binds_what_more_devices_no_longer_help():
    hours = {}
    for devices in (1, 2, 4, 50):
        report = scaling_report(curriculum(), 25_000_000, Cluster(devices, 1e12, 0.5, link=3e8))
        hours[devices] = report["hours"]
    assert hours[2] < hours[1]
    assert report["stages"][0]["bound"] == report["stages"][1]["bound"] == "link"
    assert hours[50] > hours[4] * 0.9


def test_plan_prints_it(capsys):
    from mae_et.cli import main

    flags = "plan --recipe in1k_vitb_etpp400_hog --devices 64 --device_flops 312e12 --link 25e9".split()
    main([*flags, "--early_large_batch", "--max_batch_size", "16384", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [row["batch_size"] for row in report["stages"]] == [16384, 8000, 4096]
    assert [row["images_per_device"] for row in report["stages"]] == [256, 125, 64]
    assert report["stages"][0]["lr_scale"] == 2
    scaling = report["scaling"]
    assert scaling["devices"] == 64 and len(scaling["stages"]) == 3
    assert scaling["gradient_bytes"] == pytest.approx(4 * 111e6, rel=0.02)
    main(flags)
    assert "bound by" in capsys.readouterr().out
    assert "scaling" not in plan_report(
        from_recipe(PlanConfig, "in1k_vitb_etpp400_hog"), lambda config: config.num_images
    )


def planned_on(devices: int, **flags: Any) -> dict:
    config = from_recipe(PlanConfig, "in1k_vitb_etpp400_hog")
    changes = {"devices": devices, "device_flops": 989e12} | flags
    return plan_report(replace(config, **changes), lambda config: config.num_images)


def test_a_host_with_too_little_to_do_at_once_makes_the_curriculum_slower_than_vanilla():
    few, many = (planned_on(devices, cuda_graphs="off")["scaling"] for devices in (8, 64))
    assert {row["bound"] for row in few["stages"]} == {"compute"}
    assert {row["bound"] for row in many["stages"]} == {"host"}
    # Steps of all stages then take as long, so what counts is how many there are: 284,370 against 125,114.
    assert many["hours_over_vs_at_equal_flops"] == pytest.approx(284370 / 125114, rel=0.01)
    assert few["hours_over_vs_at_equal_flops"] < 1.1


def test_with_graphs_hosts_keep_up():
    reports = [planned_on(64), planned_on(8), planned_on(64, early_large_batch=True)]
    for report, most in zip((report["scaling"] for report in reports), (1.35, 1.1, 1.1), strict=True):
        assert {row["bound"] for row in report["stages"]} == {"compute"}
        assert report["hours_over_vs_at_equal_flops"] < most


def test_estimated_utilisation_is_honest_about_small_work():
    """About what a roofline over every operator of the step gave for an H100, a fifth of its peak."""
    shares = [row["mfu"] for row in planned_on(8)["scaling"]["stages"]]
    assert shares == sorted(shares) and 0.15 < shares[0] < shares[-1] < 0.25
    assert planned_on(8)["stages"][-1]["peak_memory_bytes"] < 30 * 2**30


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--link 1e9", "--link.*--device_flops"),
        ("--images_per_second 9", "--images_per_second.*--device_flops"),
        ("--utilisation 0.5", "--utilisation.*--device_flops"),
        ("--finetune_epochs -5", "--finetune_epochs must be finite and not negative, got -5"),
        ("--start_epoch -5", "--start_epoch must be finite and not negative, got -5"),
        ("--start_epoch 500", r"--start_epoch must be in \[0, --epochs 400\), got 500"),
        ("--vs nothere", "unknown --vs 'nothere'; choose from"),
        ("--vs nothere.yaml", r"--vs: no file nothere\.yaml"),
        ("--input_size 230", r"--input_size 230 px is not divisible by the patch \(16 px\)"),
        ("--data_path /nowhere --holdout 2000000", "--holdout 2000000 leaves none of --num_images 1281167"),
        ("--model vit_huge", "unknown --model 'mae_vit_huge'"),
        (
            "--target pixel --norm_pix_loss --in_chans 1 --patch_size 1 --input_size 32",
            "--norm_pix_loss: a patch of one value has no variance",
        ),
        ("--predict_ratio 2", r"--predict_ratio must be in \(0, 1\], got 2"),
        ("--ngpus -1", "--ngpus must be positive"),
        ("--device_flops 1e12 --utilisation 40", "--utilisation"),
        ("--devices 0", "--devices must be positive"),
        ("--max_batch_size 9", "--max_batch_size.*--early_large_batch"),
        ("--early_large_batch --max_batch_size 4000", "--max_batch_size 4000 is below .* 4096, so --early_large_batch"),
        ("--lr_scaling cubic", "--lr_scaling.*sqrt, linear, none"),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys):
    from mae_et.cli import main

    with pytest.raises(SystemExit):
        main(["plan", "--recipe", "in1k_vitb_etpp400_hog", *flags.split()])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, line), line


def test_what_start_epoch_skips_is_said(capsys):
    from mae_et.cli import main

    main(["plan", "--recipe", "in1k_vitb_etpp400_hog", "--start_epoch", "100"])
    assert re.search(r"about 7\.\d+e\+18 of them are skipped by --start_epoch", capsys.readouterr().out)

"""The cost formula counts what PyTorch counts, the ledger adds up, and plans show the papers' speed-ups."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_et.engine.meters import EnergyMeter
from mae_et.model import MaskedAutoencoder, create_mae
from mae_et.plan.cost import (
    Ledger,
    StageCost,
    crop_flops,
    encoder_flops_per_image,
    flops_per_image,
    input_flops_per_image,
)
from mae_et.plan.curriculum import Curriculum, Stage
from mae_et.plan.flags import from_recipe
from mae_et.plan.report import PlanConfig, plan_report
from mae_et.plan.schedules import scheduled
from mae_et.plan.shapes import MODELS, SPECTRAL, grid_of
from mae_et.spectral import low_frequency_crop, low_frequency_input
from mae_et.targets import hog_target

# ------------------------------------------------------------------------------------------------------------ formula


def on_meta(name: str, **shape) -> MaskedAutoencoder:
    """A model without weights: shapes are all that FLOPs need."""
    with torch.device("meta"):
        return create_mae(name, **shape)


def counted(model: MaskedAutoencoder, stage: Stage) -> tuple[int, int]:
    """FLOPs of one image as PyTorch counts them: forward, and forward with backward."""
    rows, columns = grid_of(stage.size_px, model.patch_size)
    images = torch.empty(1, model.in_chans, *stage.height_width, device="meta")
    noise = torch.empty(1, rows * columns, device="meta")
    with FlopCounterMode(display=False) as counter:
        prediction = model(images, stage.num_visible, stage.num_predicted, noise).pred
        forward = counter.get_total_flops()
        prediction.sum().backward()
    return forward, counter.get_total_flops()


def assert_counts(model: MaskedAutoencoder, stage: Stage) -> None:
    assert (flops_per_image(model, stage, training=False), flops_per_image(model, stage)) == counted(model, stage)


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_counts_what_pytorch_counts(name):
    whole = name in ("mae_vit_tiny_patch16", "mae_vit_base_patch16")
    model = on_meta(name) if whole else on_meta(name, depth=3, decoder_depth=2)  # blocks are alike, and take a while
    visible = model.num_patches // 4
    assert_counts(model, Stage(224, visible, 100, 1))  # of 147 masked ones, or 192
    if whole:
        assert_counts(model, Stage(96, 9, 27, 1))


@pytest.mark.parametrize("attention", [nullcontext, lambda: sdpa_kernel(SDPBackend.MATH)], ids=["default", "math"])
@pytest.mark.parametrize(
    ("shape", "stage"),
    [
        ({"img_size": (64, 32), "in_chans": 1, "target_dim": 36}, Stage((32, 16), 5, 20, 1)),
        ({"img_size": (64, 32), "in_chans": 5, "decoder_depth": 1}, Stage((64, 32), 100, 28, 1)),
        ({"img_size": 32, "mlp_ratio": 3.0, "depth": 1, "decoder_embed_dim": 96}, Stage(32, 63, 1, 1)),
        ({"img_size": (64, 32), "decoder": "cross"}, Stage((64, 32), 32, 96, 1)),
        ({"img_size": 32, "decoder": "cross", "mlp_ratio": 3.0, "target_dim": 36}, Stage(16, 7, 3, 1)),
    ],
)
def test_it_holds_for_any_shape_and_either_attention(shape, stage, attention):
    with attention():
        assert_counts(
            on_meta("mae_vit_tiny_patch16", **{"patch_size": 4, "depth": 2, "decoder_depth": 3} | shape), stage
        )


def test_base_costs_what_facebookresearch_mae_costs_less_what_is_not_needed():
    model = on_meta("mae_vit_base_patch16")
    plan = scheduled("et_pp_192", epochs=1, num_images=10**5, batch_size=100)
    gmacs = []
    for stage in plan.stages:
        masked_embedded = stage.num_predicted * 768 * 768  # theirs embeds all patches, then drops the masked ones,
        others_predicted = (
            (1 + stage.num_visible) * 512 * 768
        )  # and predicts for every token, then drops the visible ones
        macs = flops_per_image(model, stage, training=False) / 2
        gmacs.append((macs + masked_embedded + others_predicted) / 1e9)
    assert gmacs == pytest.approx([1.83, 4.95, 7.15, 9.78], abs=0.005)


def test_features_cost_an_encoder_that_sees_everything():
    model = on_meta("mae_vit_tiny_patch16", img_size=32, patch_size=4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(torch.empty(1, 3, 32, 24, device="meta"))
    assert encoder_flops_per_image(model, 8 * 6) == counter.get_total_flops()


@pytest.mark.parametrize("operator", SPECTRAL)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_input_operators_are_counted(in_chans, operator):
    full, small, cutoff = (32, 48), (16, 24), (8, 24)
    images = torch.zeros(1, in_chans, *full)
    blurred = Stage(small, 4, 12, 1, cutoff_px=cutoff)
    low_frequency_input(images, blurred, operator)  # builds the operators, once
    with FlopCounterMode(display=False) as counter:
        hog_target(low_frequency_crop(images, small, operator), 8)
    # HOG itself is element-wise: no matrix product is counted.
    stage = Stage(small, 4, 12, 1)
    counted = input_flops_per_image(full, stage, in_chans, operator)
    assert counted == counter.get_total_flops() == in_chans * crop_flops(full, small, operator)
    assert counter.get_total_flops() > 0
    assert input_flops_per_image(full, stage, in_chans, "lanczos") == 0  # in the loader
    assert input_flops_per_image(full, Stage(full, 4, 12, 1), in_chans) == 0  # nothing to do
    with FlopCounterMode(display=False) as counter:
        low_frequency_input(images, blurred, operator)
    assert input_flops_per_image(full, blurred, in_chans, operator) == counter.get_total_flops() > counted


# ------------------------------------------------------------------------------------------------------------- ledger


def booked() -> tuple[Curriculum, Ledger]:
    stages = (
        Stage(16, 4, 12, 8, steps=3, flops_per_image=10.0),
        Stage((32, 16), 8, 20, 6, steps=2, flops_per_image=50.0),
    )
    curriculum = Curriculum(stages, num_images=36)
    ledger = Ledger.of(curriculum)
    for step in range(curriculum.total_steps):
        ledger.add(curriculum.index(step), curriculum.at(step), train_seconds=2.0**step, data_seconds=0.5)
    ledger.stages[0].peak_memory_bytes, ledger.stages[1].peak_memory_bytes = 700, 300
    ledger.stages[0].eval_seconds, ledger.stages[1].warmup_seconds = 0.25, 4.0
    return curriculum, ledger


def test_the_ledger_books_every_step_on_its_stage():
    curriculum, ledger = booked()
    seconds = {"data_seconds": 1.5, "eval_seconds": 0.25}
    first = StageCost(16, 3, 24, 96, 288, 240.0, train_seconds=7.0, peak_memory_bytes=700, decoded_images=24, **seconds)
    second = StageCost(
        (32, 16), 2, 12, 96, 240, 600.0, 24.0, 1.0, warmup_seconds=4.0, peak_memory_bytes=300, decoded_images=12
    )
    assert ledger.stages == [first, second]
    assert [account.images for account in ledger.stages] == [stage.images for stage in curriculum.stages]
    assert ledger.total == StageCost(
        (32, 16), 5, 36, 192, 528, 840.0, 31.0, 2.5, 0.25, 4.0, peak_memory_bytes=700, decoded_images=36
    )
    assert ledger.total.flops == curriculum.total_flops
    assert ledger.total.seconds == 33.5
    assert ledger.total.data_wait == 2.5 / 33.5
    assert StageCost(16).data_wait == 0


def test_the_ledger_survives_a_checkpoint_and_a_json_file():
    _, ledger = booked()
    state = ledger.state_dict()
    assert Ledger.from_state_dict(state) == ledger
    written = json.loads(json.dumps(state))
    assert written["total"]["flops"] == 840.0
    assert {type(value) for account in written["stages"] for value in account.values()} <= {int, float, list}
    again = Ledger.from_state_dict(state)
    again.add(0, Stage(16, 4, 12, 8), train_seconds=1.0, data_seconds=0.0)
    assert again.total.steps == ledger.total.steps + 1  # goes on, and shares nothing with the state it came from
    assert Ledger.from_state_dict(state) == ledger


# --------------------------------------------------------------------------------------------------- papers' speed-ups


def report(recipe: str, vs: str = "") -> dict:
    return plan_report(replace(from_recipe(PlanConfig, recipe), vs=vs), lambda config: config.num_images)


def test_et_pp_with_hog_costs_a_quarter_of_1600_epochs():
    found = report("in1k_vitb_etpp400_hog", "in1k_vitb_mae1600")
    assert 3.95 <= found["vs"]["speedup_flops"] <= 4.01  # ET++, Table 15: 3.98
    assert [row["size_px"] for row in found["stages"]] == [96, 160, 224]
    assert [row["compute_share"] for row in found["stages"]] == pytest.approx([0.2, 0.4, 0.4], abs=0.01)


def test_another_recipe_is_compared_on_the_same_images():
    config = replace(from_recipe(PlanConfig, "in1k_vitb_etpp400_hog"), vs="in1k_vitb_mae1600", num_images=50_000)
    for changed in (config, replace(config, data_path="mine", holdout=10_000)):
        counted = []

        def count(config, counted=counted):
            counted.append((config.data_path, config.num_images, config.holdout))
            return config.num_images - config.holdout

        assert plan_report(changed, count)["vs"]["speedup_flops"] == pytest.approx(3.98, abs=0.04)
        assert counted == [(changed.data_path, 50_000, changed.holdout)] * 2


@pytest.mark.parametrize(("recipe", "stated"), [("in1k_vitb_et1600", 1.54), ("in1k_vitl_et1600", 1.53)])
def test_et_is_as_much_cheaper_than_its_vanilla_twin_as_published(recipe, stated):
    found = report(recipe)
    assert found["vs"]["speedup_flops"] == pytest.approx(stated, abs=0.01)
    assert (
        found["totals"]["passes"]
        == pytest.approx(found["vs"]["totals"]["passes"], abs=0.01)
        == pytest.approx(1600, abs=0.01)
    )
    named = report(recipe, recipe.replace("et1600", "mae1600"))
    assert named["vs"]["speedup_flops"] == pytest.approx(found["vs"]["speedup_flops"], rel=1e-6)


def test_energy_is_what_the_packages_counted_between_readings(tmp_path, monkeypatch):
    package, part = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"  # a part of a package counts once
    for folder in (package, part):
        folder.mkdir()
        (folder / "energy_uj").write_text("1000000")
    monkeypatch.setattr("mae_et.engine.meters.POWERCAP", tmp_path)
    meter = EnergyMeter(torch.device("cpu"))
    for folder in (package, part):
        (folder / "energy_uj").write_text("3500000")
    assert meter.since() == pytest.approx(2.5)
    (package / "energy_uj").write_text("100")  # the counter has run over
    assert meter.since() == 0
    (package / "energy_uj").unlink()
    assert meter.since() == 0


def test_energy_is_nothing_where_nothing_tells(tmp_path, monkeypatch):
    monkeypatch.setattr("mae_et.engine.meters.POWERCAP", tmp_path)
    assert EnergyMeter(torch.device("cpu")).since() == 0

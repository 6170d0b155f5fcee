"""Schedules as published, and what holds for every plan whatever its numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mae_et.plan.curriculum import StageRow
from mae_et.plan.schedules import (
    ALLOCATIONS,
    SCHEDULES,
    SHARES_OF,
    efficient_train,
    efficient_train_pp,
    patch_counts,
    plan_stages,
    scheduled,
    vanilla,
)
from mae_et.plan.shapes import as_size, grid_of

MANY = settings(max_examples=80)
IMAGENET = {"num_images": 1_281_167, "batch_size": 4096}


def sizes(curriculum) -> list:
    return [stage.size_px for stage in curriculum.stages]


# ------------------------------------------------------------------------------------------------ published schedules


@pytest.mark.parametrize(
    ("full_size_px", "patch_px", "et_pp_192"),
    [
        (224, 16, [96, 160, 192, 224]),
        (32, 4, [16, 24, 28, 32]),
        (64, 8, [32, 48, 56, 64]),
        (224, 14, [98, 168, 196, 224]),  # huge
        ((224, 160), 16, [(96, 80), (160, 128), (192, 144), (224, 160)]),
        ((64, 128), 8, [(32, 56), (48, 96), (56, 112), (64, 128)]),
    ],
)
def test_sizes_scale_with_the_full_size_and_the_patch(full_size_px, patch_px, et_pp_192):
    def planned(name):
        return sizes(
            scheduled(name, full_size_px=full_size_px, patch_px=patch_px, epochs=100, num_images=1000, batch_size=10)
        )

    assert planned("et_pp_192") == et_pp_192
    assert planned("et_pp") == [et_pp_192[0], et_pp_192[1], et_pp_192[3]]
    assert planned("et") == et_pp_192[1:]
    assert planned("vanilla") == [as_size(full_size_px)]


def test_visible_and_predicted_patches_are_those_of_the_paper():
    plan = scheduled("et_pp_192", epochs=400, **IMAGENET)
    assert [math.prod(grid_of(stage.size_px, 16)) for stage in plan.stages] == [36, 100, 144, 196]
    assert [stage.num_visible for stage in plan.stages] == [9, 25, 36, 49]
    assert [stage.num_predicted for stage in plan.stages] == [27, 75, 108, 147]


def test_a_ratio_loses_no_patch_in_floating_point():
    assert int(100 * (1 - 0.9)) == 9  # the trap
    assert patch_counts(StageRow(160, 1.0), 16, mask_ratio=0.9, predict_ratio=1.0) == (10, 90)
    assert patch_counts(StageRow(160, 1.0, mask_ratio=0.6, predict_ratio=0.55), 16, 0.9, 1.0) == (40, 33)
    assert patch_counts(StageRow(160, 1.0, num_visible=7, num_predicted=5), 16, 0.9, 1.0) == (7, 5)


def test_400_equivalent_epochs_make_the_published_passes():
    plan = efficient_train_pp(epochs=400, allocation="area", **IMAGENET)
    assert [plan.passes(stage) for stage in plan.stages] == pytest.approx([435.6, 313.6, 160.0], abs=0.05)


def test_et_shares_epochs_not_compute():
    plan = efficient_train(epochs=1600, **IMAGENET)
    assert [plan.passes(stage) for stage in plan.stages] == pytest.approx([960, 320, 320], abs=0.01)


def test_vanilla_is_one_stage():
    (stage,) = vanilla(epochs=1600, **IMAGENET).stages
    assert (stage.size_px, stage.batch_size, stage.crop_scale, stage.augment) == (224, 4096, (0.2, 1.0), 0)
    assert stage.steps == round(1600 * 1_281_167 / 4096)


def test_the_schedules_are_those_of_the_papers():
    assert all(sum(share for _, share in rows) == pytest.approx(1) for _, rows in SCHEDULES.values())
    assert {name: share_of for name, (share_of, _) in SCHEDULES.items() if name != "vanilla"} == {
        "et": "epochs",
        "et_pp": "compute",
        "et_pp_192": "compute",
    }


def test_a_row_overrules_the_run():
    first_row = StageRow(16, 0.5, batch_size=4, cutoff_px=8, crop_scale=(0.5, 1.0), augment=3, lr_scale=0.5)
    rows = [first_row, StageRow(32, 0.5)]
    plan = plan_stages(rows, epochs=10, num_images=100, batch_size=8, full_size_px=32, patch_px=4, augment=9)
    first, second = plan.stages
    assert (first.batch_size, first.crop_scale, first.augment, first.lr_scale) == (4, (0.5, 1.0), 3, 0.5)
    assert (first.cutoff_px, second.cutoff_px) == (8, None)
    assert (second.batch_size, second.crop_scale, second.augment, second.lr_scale) == (8, (0.2, 1.0), 9, 1.0)


# ------------------------------------------------------------------------------------------------------- any numbers


@st.composite
def plans(draw):
    """Any custom schedule at a full size of 32 px, patch 4."""
    count = draw(st.integers(1, 5))
    weights = draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))
    rows = [
        StageRow(
            draw(st.sampled_from([8, 16, 24, 32, (16, 32), (8, 12)])),
            weight / sum(weights),
            batch_size=draw(st.sampled_from([None, None, 3, 50])),
        )
        for weight in weights
    ]
    return plan_stages(
        rows,
        epochs=draw(st.floats(0.1, 300)),
        num_images=draw(st.integers(1, 5000)),
        batch_size=draw(st.integers(1, 300)),
        full_size_px=32,
        patch_px=4,
        share_of=draw(st.sampled_from(SHARES_OF)),
        allocation=draw(st.sampled_from(ALLOCATIONS)),
    )


@MANY
@given(plans())
def test_steps_images_and_remainder_add_up(plan):
    assert all(stage.steps >= 1 for stage in plan.stages)
    assert plan.total_steps == sum(stage.steps for stage in plan.stages)
    assert plan.total_images == sum(stage.images for stage in plan.stages) == plan.images_before(plan.total_steps)
    assert plan.total_flops == pytest.approx(sum(stage.flops for stage in plan.stages))
    assert sum(plan.passes(stage) for stage in plan.stages) * plan.num_images == pytest.approx(plan.total_images)
    if all(stage.steps > 1 for stage in plan.stages):  # no stage was clamped to its one step
        assert abs(plan.remainder_images) <= plan.stages[-1].batch_size / 2 + 1e-6 * plan.total_images


@MANY
@given(plans(), st.data())
def test_position_and_stage_agree_at_every_step(plan, data):
    starts = [plan.start(i) for i in range(len(plan.stages))]
    assert starts[0] == 0
    for i, start in enumerate(starts):
        assert plan.at(start) is plan.stages[i]
        assert start == 0 or plan.at(start - 1) is plan.stages[i - 1]
    assert plan.at(plan.total_steps - 1) is plan.stages[-1]
    for step in (-1, plan.total_steps):
        with pytest.raises(IndexError, match=f"step {step} is outside the plan of {plan.total_steps} steps"):
            plan.at(step)

    some = data.draw(st.lists(st.integers(0, plan.total_steps - 1), max_size=20))
    steps = sorted({0, plan.total_steps, *starts, *some})
    positions = [plan.position(step) for step in steps]
    assert positions[0] == 0
    assert positions[-1] == 1
    assert all(a < b for a, b in pairwise(positions))
    for step in steps[:-1]:
        assert plan.images_before(step + 1) - plan.images_before(step) == plan.at(step).batch_size
        assert plan.position(step + 1) - plan.position(step) == pytest.approx(
            plan.at(step).batch_size * plan.at(step).flops_per_image / plan.total_flops, abs=1e-9
        )


@MANY
@given(
    name=st.sampled_from(["et_pp", "et_pp_192"]),
    epochs=st.floats(1, 2000),
    num_images=st.integers(50, 10**6),
    batch_size=st.integers(1, 4096),
    attention=st.floats(0, 1),
)
def test_exact_allocation_costs_as_much_as_vanilla(name, epochs, num_images, batch_size, attention):
    def flops(stage):  # more than proportional to the patches, as attention is
        patches = math.prod(grid_of(stage.size_px, 16))
        return patches * (1 + attention * patches)

    common = {"epochs": epochs, "num_images": num_images, "batch_size": batch_size, "flops_per_image": flops}
    plan, plain = (scheduled(n, allocation="flops", **common) for n in (name, "vanilla"))
    assume(all(stage.steps > 1 for stage in (*plan.stages, *plain.stages)))
    # Each running total of images is off by half a batch at most and sizes grow: together one batch at full size.
    one_batch = batch_size * plain.stages[0].flops_per_image
    assert abs(plan.total_flops - epochs * num_images * plain.stages[0].flops_per_image) <= one_batch * (1 + 1e-6)
    assert abs(plan.total_flops - plain.total_flops) <= 1.5 * one_batch * (1 + 1e-6)
    shares = [stage.flops / plan.total_flops for stage in plan.stages]
    wanted = [share for _, share in SCHEDULES[name][1]]
    assert shares == pytest.approx(wanted, abs=2 * one_batch / plan.total_flops)


def test_a_stage_too_short_for_a_step_gets_one_and_the_remainder_says_so():
    plan = efficient_train_pp(epochs=1, num_images=10, batch_size=100)
    assert [stage.steps for stage in plan.stages] == [1, 1, 1]
    assert plan.remainder_images == pytest.approx(10 * (0.2 * (224 / 96) ** 2 + 0.4 * 1.96 + 0.4) - 300)


# ------------------------------------------------------------------------------------------------------------ errors

PLAN = {"epochs": 1, "num_images": 100, "batch_size": 10}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scheduled("etpp", **PLAN), "unknown curriculum 'etpp'; choose from vanilla, et, et_pp, et_pp_192"),
        (lambda: vanilla(allocation="time", **PLAN), "unknown allocation 'time'; choose from area, flops"),
        (
            lambda: plan_stages([StageRow(224, 1)], share_of="x", **PLAN),
            "unknown share_of 'x'; choose from compute, epochs",
        ),
        (lambda: plan_stages([], **PLAN), "at least one stage"),
        (
            lambda: plan_stages([StageRow(96, 0.5), StageRow(224, 0.4)], **PLAN),
            r"shares must be positive and add to 1; 0\.5 \+ 0\.4 = 0\.9",
        ),
        (lambda: plan_stages([StageRow(96, 1.2), StageRow(224, -0.2)], **PLAN), "must be positive and add to 1; 1.2 "),
        (
            lambda: plan_stages([StageRow(100, 1)], **PLAN),
            r"size 100 px is not divisible by the patch \(16 px\): 96 px would be",
        ),
        (lambda: plan_stages([StageRow((8, 90), 1)], **PLAN), "size 8×90 px is not divisible .*: 16×96 px would be"),
        (lambda: plan_stages([StageRow((1, 2, 3), 1)], **PLAN), "a size is one integer or"),
        (lambda: StageRow(32, 1, cutoff_px=32), "cutoff_px 32 must be positive and smaller than size_px 32"),
        (lambda: StageRow((32, 16), 1, cutoff_px=24), "cutoff_px 24 must be positive and smaller than size_px 32×16"),
        (lambda: StageRow(32, 1, cutoff_px=0), "cutoff_px 0 must be positive"),
        (lambda: StageRow(32, 1, lr_scale=-1.0), "lr_scale must be finite and not negative, got -1"),
        (lambda: StageRow(32, 1, lr_scale=math.nan), "lr_scale must be finite and not negative, got nan"),
        (lambda: StageRow(32, 1, lr_scale=math.inf), "lr_scale must be finite and not negative, got inf"),
        (lambda: StageRow(32, 1, mask_ratio=math.nan), r"mask_ratio must be in \[0, 1\), got nan"),
        (lambda: StageRow(32, 1, predict_ratio=math.nan), r"predict_ratio must be in \(0, 1\], got nan"),
        (lambda: vanilla(**PLAN | {"epochs": 0}), "epochs must be positive, got 0"),
        (lambda: vanilla(**PLAN | {"epochs": float("nan")}), "epochs must be positive, got nan"),
        (lambda: vanilla(**PLAN | {"num_images": 0}), "number of images must be positive, got 0"),
        (lambda: vanilla(**PLAN | {"batch_size": -1}), "batch size must be positive, got -1"),
        (lambda: vanilla(mask_ratio=0.0, **PLAN), "^--mask_ratio 0: .* 196 patches, of which 196 .* at most 195"),
        (lambda: vanilla(mask_ratio=0.999, **PLAN), "^--mask_ratio 0.999: .* of which 0 would be visible; at least 1"),
        (lambda: vanilla(predict_ratio=0.0, **PLAN), "^--predict_ratio 0: .* 147 masked patches, of which 0"),
        (lambda: vanilla(predict_ratio=1.1, **PLAN), "^--predict_ratio 1.1: .* at most all of them"),
        (lambda: plan_stages([StageRow(224, 1, mask_ratio=0.999)], **PLAN), "^stages: mask_ratio 0.999: .* of which 0"),
        (lambda: plan_stages([StageRow(224, 1, num_visible=196)], **PLAN), "^stages: num_visible 196: .* at most 195"),
        (
            lambda: plan_stages([StageRow(224, 1, mask_ratio=0.5, predict_ratio=0.001)], **PLAN),
            "^stages: predict_ratio 0.001: .* 98 masked patches, of which 0",
        ),
        (
            lambda: plan_stages([StageRow(224, 1, num_predicted=148)], **PLAN),
            "^stages: num_predicted 148: .* 147 masked patches, of which 148",
        ),
    ],
)
def test_errors_name_what_is_wrong_and_what_is_legal(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)

"""Arms and comparability: what follows from the role of every flag, for all flags, those still to come included."""

from __future__ import annotations

import contextlib
import itertools
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt
from run_folders import SMALL, evaluate_again, write_run, write_untrained

from mae_et.compare.compare import CompareConfig, compare
from mae_et.compare.figures import draw_figures
from mae_et.compare.report import answer_table, markdown
from mae_et.compare.runs import incomparable, read_run
from mae_et.evaluate.config import FinetuneConfig
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import StageRow
from mae_et.plan.flags import OneOf, roles, to_dict
from mae_et.plan.shapes import MODELS

VALUES: dict[Any, tuple[Any, ...]] = {
    bool: (True, False),
    int: (2, 3),
    float: (0.25, 0.5, 3.0),
    str: MODELS,  # as good as any other text where a flag takes any
    StageRow: (StageRow(16, 0.5), StageRow(24, 0.5)),
    type(None): (),
}
#: What some flags are legal with only. A flag that no value is found for needs another row here.
COMPANIONS: dict[type, tuple[dict[str, Any], ...]] = {
    PretrainConfig: (
        SMALL,
        SMALL | {"early_large_batch": True},
        SMALL | {"holdout": 3},
        SMALL | {"curriculum": "custom", "stages": (StageRow(32, 0.5),)},
    ),
    FinetuneConfig: ({}, {"finetune": "run"}, {"finetune": "run", "linear_probe": True}),
}
#: By name, so that a role that changes by mistake is seen.
OTHER_ARM = (
    *("replay", "views_per_image", "masks_per_image", "compile", "cuda_graphs"),
    "start_epoch",
    *("lowfreq", "target", "mask_ratio", "curriculum", "lr", "epochs", "batch_size", "total_batch_size", "accum_iter"),
)
SAME_ARM = (
    *("seed", "keep_checkpoints", "save_steps", "num_workers", "cache_gib", "print_steps", "output_dir", "device"),
    *("precision", "replay_gib"),
)
COMPARABLE = ("seed", "finetune", "keep_checkpoints", "num_workers", "eval_epochs", "save_steps", "report")
LENGTHS = ("epochs", "warmup_epochs", "hold_epochs")


def values_of(hint: Any) -> Iterator[Any]:
    """Values of a type, some of which a flag of that type may take."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for kind in arguments:
            yield from values_of(kind)
    elif origin is tuple:
        lengths = (1, 3) if arguments[-1] is Ellipsis else (len(arguments),)  # 3: one for each channel
        for length in lengths:
            yield from itertools.product(values_of(arguments[0]), repeat=length)
    else:
        yield from VALUES[hint]


def differing(config_type: type, flag: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of two legal configurations that differ in one flag."""
    hint = typing.get_type_hints(config_type, include_extras=True)[flag]
    marks = [mark for mark in hint.__metadata__ if isinstance(mark, OneOf)]
    kind = typing.get_args(hint)[0]
    values = marks[0].legal if marks else list(values_of(kind))
    if marks and typing.get_origin(kind) is tuple:
        values = [(value,) for value in values]
    for companions, value in itertools.product(COMPANIONS[config_type], values):
        with contextlib.suppress(ValueError):
            if config_type(**companions) != config_type(**(companions | {flag: value})):
                return companions, companions | {flag: value}
    raise AssertionError(f"no second legal value of --{flag} found; add what it needs to VALUES or COMPANIONS")


def arms_of(folder: Path) -> list[dict[str, Any]]:
    """Arms of the runs a, b … in a folder, for all that differs between them."""
    return compare(CompareConfig((str(folder),), baseline=(str(folder / "a"),), force=True))["arms"]


# ── arms ──


@pytest.mark.parametrize("flag", roles(PretrainConfig))
def test_a_flag_makes_another_arm_where_its_role_or_the_total_batch_says_so(tmp_path, flag):
    first, second = differing(PretrainConfig, flag)
    write_run(tmp_path / "a", **first)
    write_run(tmp_path / "b", **({"seed": 1} | second))
    batches = {PretrainConfig(**values).total_batch(1) for values in (first, second)}
    # What these two mean is told by what was computed in, and whether anything is replayed.
    has_role = roles(PretrainConfig)[flag].arm and flag not in ("precision", "replay_gib")
    other_arm = flag in OTHER_ARM or has_role or len(batches) > 1
    assert not (other_arm and flag in SAME_ARM)
    arms = arms_of(tmp_path)
    assert [arm["n"] for arm in arms] == ([1, 1] if other_arm else [2])
    if flag in LENGTHS:
        assert arms[0]["family"] == arms[1]["family"] == "vanilla"
    elif other_arm and flag not in ("curriculum", "stages"):  # whose names say it
        assert any(flag in arm["differs"] or "total_batch" in arm["differs"] for arm in arms)


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({"size_px": 16}, {"size_px": 24}, ["custom · stage size_px 16/32", "custom · stage size_px 24/32"]),
        ({"share": 0.25}, {"share": 0.5}, ["custom · stage share 0.25/0.5", "custom · stage share 0.5/0.5"]),
        ({"mask_ratio": 0.9}, {}, ["custom · stage mask_ratio 0.9/–", "custom · stage mask_ratio –/–"]),
        ({"share": 0.5}, {"share": 0.5 + 1e-9}, ["custom", "custom (2)"]),
    ],
)
def test_custom_curricula_are_named_by_what_differs_between_their_stages(tmp_path, first, second, named):
    """Folders that end in seed0 name no arm. Where folders do, the families still are two."""
    rows = [{"size_px": 16, "share": 0.5} | row for row in (first, second)]
    for layout, names in (("{}/seed0", named), ("{}-seed0", ["early", "late"])):
        folders = [tmp_path / layout.format(name) for name in ("plain", "early", "late")]
        write_run(folders[0])
        for folder, row in zip(folders[1:], rows, strict=True):
            stages = (StageRow(**row), StageRow(32, 0.5))
            write_run(folder, curriculum="custom", stages=stages, stage_sizes=[16, 32])
        report = compare(CompareConfig(tuple(map(str, folders))))
        assert [(arm["name"], arm["family"]) for arm in report["arms"][1:]] == list(zip(names, named, strict=True))
        assert [row[0] for row in answer_table(report)[1]] == names
        legend = draw_figures(report)["knn-flops"].legends[0]
        assert [text.get_text() for text in legend.get_texts()][1:] == names, "short, where a family is one arm"
        plt.close("all")


def test_a_flag_that_is_zero_names_an_arm(tmp_path):
    write_run(tmp_path / "plain" / "seed0", augment=0)
    write_run(tmp_path / "strong" / "seed0", augment=9)
    report = compare(CompareConfig((str(tmp_path / "plain"), str(tmp_path / "strong")), force=True))
    assert [arm["name"] for arm in report["arms"]] == ["vanilla · augment 0", "vanilla · augment 9"]


def test_lengths_are_one_family_and_one_curve(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", flops=2e12, top1=81.0, epochs=8, warmup_epochs=2, hold_epochs=1)
    write_run(tmp_path / "c", flops=4e12, top1=82.0, epochs=16, warmup_epochs=1, hold_epochs=2)
    write_run(tmp_path / "d", flops=2e12, top1=90.0, curriculum="et_pp", stage_sizes=[16, 32])
    report = compare(CompareConfig((str(tmp_path),)))
    assert report["baseline"] == ["a", "b", "c"]
    assert [arm["family"] for arm in report["arms"]].count("vanilla") == 3


def test_the_same_total_batch_is_one_arm_however_it_comes_together(tmp_path):
    write_run(tmp_path / "a", 0, batch_size=64)
    write_run(tmp_path / "b", 1, batch_size=16, accum_iter=2, environment={"devices": 2})
    write_run(tmp_path / "c", 2, batch_size=8, total_batch_size=64, environment={"devices": 4})
    assert [arm["n"] for arm in arms_of(tmp_path)] == [3]
    write_run(tmp_path / "d", 3, batch_size=64, environment={"devices": 2})  # learns at the rate of 128
    assert [arm["n"] for arm in arms_of(tmp_path)] == [3, 1]


def test_a_flag_left_open_counts_by_what_came_of_it(tmp_path):
    write_run(tmp_path / "a", 0)
    write_run(tmp_path / "b", 1, num_heads=16, embed_dim=1024)  # as the model's name says
    assert [arm["n"] for arm in arms_of(tmp_path)] == [2]
    write_run(tmp_path / "c", 2, environment={"precision": "fp32"})  # --precision auto, on another device
    assert [arm["n"] for arm in arms_of(tmp_path)] == [2, 1]
    write_run(tmp_path / "d", 3, precision="bf16")  # as auto became on the device of a and b
    assert [arm["n"] for arm in arms_of(tmp_path)] == [3, 1]


def test_the_size_of_a_buffer_counts_where_there_is_one(tmp_path):
    for seed, (name, flags) in enumerate({"a": {}, "b": {"replay_gib": 8.0}, "c": {"replay": True}}.items()):
        write_run(tmp_path / name, seed, **flags)
    write_run(tmp_path / "d", 3, replay=True, replay_gib=8.0)
    assert sorted(arm["n"] for arm in arms_of(tmp_path)) == [1, 1, 2]


def test_the_same_seed_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        for seed in range(2):
            write_run(tmp_path / f"{name}{seed}", seed, keep_checkpoints=5 if name == "b" else 2)
    with pytest.raises(ValueError, match=r"a0 and .*b0 are the same configuration with the same seed; leave one out"):
        compare(CompareConfig((str(tmp_path),)))


def test_folders_named_anyhow_are_named_by_what_differs(tmp_path):
    write_run(tmp_path / "monday", 0)
    write_run(tmp_path / "tuesday", 1)
    write_run(tmp_path / "x", 0, curriculum="et_pp", target="hog", stage_sizes=[16, 32])
    names = [arm["name"] for arm in compare(CompareConfig((str(tmp_path),)))["arms"]]
    assert sorted(names) == ["et_pp · hog", "vanilla · pixel"]


# ── comparability ──


@pytest.mark.parametrize("flag", roles(PretrainConfig))
def test_runs_are_comparable_unless_a_flag_of_data_or_model_differs(tmp_path, flag):
    first, second = differing(PretrainConfig, flag)
    write_run(tmp_path / "a", **first)
    write_run(tmp_path / "b", **({"seed": 1} | second))
    report = compare(CompareConfig((str(tmp_path),), baseline=(str(tmp_path / "a"),), force=True))
    assert bool(report["forced"]) == roles(PretrainConfig)[flag].match
    assert all(sentence.startswith(f"{flag} is ") for sentence in report["forced"][:1])


def scratch_arms(folder: Path) -> dict[str, list[int]]:
    """Seeds by name of the arms without pretraining."""
    return {arm["name"]: arm["seeds"] for arm in arms_of(folder) if not arm["stages"]}


def test_untrained_models_are_arms_of_their_own(tmp_path):
    write_run(tmp_path / "a")
    for seed in (0, 1):
        write_untrained(tmp_path / f"tiny{seed}", like=f"runs/tiny-seed{seed}", seed=seed, knn=True)
    assert scratch_arms(tmp_path) == {"from scratch": [0, 1]}
    write_untrained(tmp_path / "huge", 40.0, like="runs/huge/", seed=2, knn=True)
    assert scratch_arms(tmp_path) == {"from scratch · like runs/huge": [2], "from scratch · like runs/tiny": [0, 1]}


def test_evaluations_of_one_untrained_model_are_one_run(tmp_path):
    """Unless both folders hold the same evaluation."""
    write_run(tmp_path / "a")
    write_untrained(tmp_path / "scratch", like="runs/a")
    write_untrained(tmp_path / "untrained", like="runs/a", knn=True)
    (scratch,) = [arm for arm in arms_of(tmp_path) if not arm["stages"]]
    assert scratch["n"] == 1 and set(scratch["quality"]) == {"finetune", "knn"}
    write_untrained(tmp_path / "untrained2", like="runs/a", knn=True)
    with pytest.raises(ValueError, match=r"untrained2 are the same configuration with the same seed"):
        arms_of(tmp_path)


def test_a_model_trained_from_scratch_by_its_name_is_compared_with_pretrained_ones_of_its_shape(tmp_path):
    for name, curriculum in (("a", "vanilla"), ("b", "et")):
        run = write_run(tmp_path / name, curriculum=curriculum, model="mae_vit_tiny_patch16", protocol="finetune")
        result = json.loads((run / "eval-finetune.json").read_text())
        result["flags"] = to_dict(FinetuneConfig(finetune="run"))
        (run / "eval-finetune.json").write_text(json.dumps(result))
    flags = {"model": "vit_tiny_patch16", "patch_size": 8, "input_size": 32}
    write_untrained(tmp_path / "scratch", **flags)
    report = compare(CompareConfig((str(tmp_path),)))
    assert (report["arms"][0]["name"], report["forced"]) == ("from scratch", [])
    write_untrained(tmp_path / "deep", **flags, depth=24)
    with pytest.raises(ValueError, match=r"evaluation finetune: --depth is 12 in .*a and 24 in .*deep"):
        compare(CompareConfig((str(tmp_path),)))


def test_a_fine_tuning_of_pretrained_weights_is_no_run_to_compare(tmp_path):
    write_run(tmp_path / "a")
    write_untrained(tmp_path / "finetune", finetune="runs/a")
    with pytest.raises(ValueError, match="give the pretraining run it started from"):
        arms_of(tmp_path)


@pytest.mark.parametrize("flag", roles(FinetuneConfig))
def test_evaluations_are_comparable_unless_a_judged_flag_or_the_data_differ(tmp_path, flag):
    for name, values in zip("ab", differing(FinetuneConfig, flag), strict=True):
        run = write_run(tmp_path / name, curriculum="vanilla" if name == "a" else "et", protocol="finetune")
        result = json.loads((run / "eval-finetune.json").read_text())
        result["flags"] = to_dict(FinetuneConfig(**values))
        (run / "eval-finetune.json").write_text(json.dumps(result))
    refused = roles(FinetuneConfig)[flag].judged or flag == "data_path"
    assert not (refused and flag in COMPARABLE)
    sentences = compare(CompareConfig((str(tmp_path),), force=True))["forced"]
    assert bool(sentences) == refused
    assert not refused or any(f"evaluation finetune: --{flag} is " in sentence for sentence in sentences)


def test_evaluations_are_compared_by_what_auto_became(tmp_path):
    for name, precision, became in (("a", "auto", "bf16"), ("b", "bf16", "bf16"), ("c", "auto", "fp32")):
        write_run(tmp_path / name, curriculum="vanilla" if name == "a" else "et", epochs=4 + len(name) + ord(name))
        result = json.loads((tmp_path / name / "eval-knn.json").read_text())
        result["flags"]["precision"], result["environment"] = precision, {"precision": became}
        (tmp_path / name / "eval-knn.json").write_text(json.dumps(result))
    (sentence,) = compare(CompareConfig((str(tmp_path),), force=True))["forced"]
    assert "--precision is bf16" in sentence and "fp32" in sentence


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data_path": "elsewhere"}, "data_path is photos"),
        ({"patch_size": 4}, "patch_size is 8"),
        ({"embed_dim": 96}, "embed_dim is 1024"),
        ({"model": "mae_vit_tiny_patch16", "patch_size": 8}, "model is mae_vit_large_patch16"),
        ({"environment": {"num_images": 7}}, "data set has 1000 images"),
        ({"k": 5}, "evaluation knn: --k is 20"),
        ({"eval_images": 100}, "evaluation knn: num_images is 500"),
        ({"p": 0.4}, "stopped at 40%"),
    ],
)
def test_what_cant_be_compared_is_refused_and_forced_only_in_writing(tmp_path, changes, named):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", curriculum="et", stage_sizes=[16, 32], **changes)
    with pytest.raises(ValueError, match="not comparable") as refused:
        compare(CompareConfig((str(tmp_path),)))
    assert named in str(refused.value)
    report = compare(CompareConfig((str(tmp_path),), force=True))
    assert any(named in difference for difference in report["forced"])
    assert f"FORCED although not comparable: {report['forced'][0]}" in markdown(report)


def test_evaluations_on_other_data_are_refused(tmp_path):
    write_run(tmp_path / "a")
    result = json.loads(
        (write_run(tmp_path / "b", curriculum="et", stage_sizes=[16, 32]) / "eval-knn.json").read_text()
    )
    result["flags"]["data_path"] = "elsewhere"
    (tmp_path / "b" / "eval-knn.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"--data_path is photos .* and elsewhere"):
        compare(CompareConfig((str(tmp_path),)))


def test_the_report_says_which_evaluations_are_on_other_data(tmp_path):
    for name, changes in (("a", {}), ("b", {"curriculum": "et", "stage_sizes": [16, 32]})):
        run = write_run(tmp_path / name, **changes)
        evaluate_again(run, "linear_probe", 30.0)
        path = run / "eval-linear_probe.json"
        result = json.loads(path.read_text())
        result["flags"]["data_path"] = "elsewhere/"
        path.write_text(json.dumps(result))
    warnings = compare(CompareConfig((str(tmp_path),)))["warnings"]
    assert "judged on elsewhere, not on the data of the pretraining: linear_probe" in warnings


def test_a_slash_after_a_folder_makes_no_other_data(tmp_path):
    write_run(tmp_path / "a", data_path="data/x")
    write_run(tmp_path / "b", curriculum="et", stage_sizes=[16, 32], data_path="data/x/")
    report = compare(CompareConfig((str(tmp_path),)))
    assert report["forced"] == []
    assert not any("judged on" in warning for warning in report["warnings"])


def test_other_blocks_and_poolings_and_corrupted_images_are_protocols_of_their_own(tmp_path):
    folder = write_run(tmp_path / "a", top1=50.0)
    path = folder / "eval-knn.json"
    places = [
        {"layer": layer, "pooling": pooling, "top1": top1}
        for layer, pooling, top1 in ((2, "cls", 40.0), (2, "mean", 45.0), (6, "cls", 50.0), (6, "mean", 55.0))
    ]
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"places": places, "corrupted_top1": 30.0}))
    named = {name: each["top1"] for name, each in read_run(folder).evaluations.items()}
    others = {"knn-block2-cls": 40.0, "knn-block2-mean": 45.0, "knn-block6-mean": 55.0}
    assert named == {"knn": 50.0, "knn-corrupted": 30.0} | others  # block 6, cls is knn itself
    path.write_text(json.dumps(result | {"places": places[2:3]}))  # without --layers
    assert list(read_run(folder).evaluations) == ["knn"]


def test_a_result_of_half_trained_weights_does_not_count_as_the_finished_runs(tmp_path):
    """A run may go on after it was evaluated; then its result is of other weights."""
    folder = write_run(tmp_path / "run")
    path = folder / "eval-knn.json"
    result = json.loads(path.read_text())
    for step, sentences in (
        (None, []),
        (10, []),
        (6, [f"evaluation knn of {folder} is of step 6 of 10: evaluate it again"]),
    ):
        path.write_text(json.dumps(result | {"step": step}))
        assert incomparable([read_run(folder)]) == sentences


@pytest.mark.parametrize(
    ("folder", "seed", "name"),
    [
        ("vanilla-seed2", 2, "vanilla"),
        ("vanilla_s2", 2, "vanilla"),
        ("vanilla-2", 2, "vanilla"),
        ("in1k_vitb_mae1600", 0, "in1k_vitb_mae1600"),
        ("et_pp_192", 0, "et_pp_192"),
        ("lr1e-3", 0, "lr1e-3"),
        ("10-epochs_20", 0, "10-epochs_20"),
    ],
)
def test_only_its_own_seed_is_no_part_of_a_name(tmp_path, folder, seed, name):
    write_run(tmp_path / folder, seed=seed, curriculum="vanilla")
    write_run(tmp_path / "other", curriculum="et", flops=2e12)
    assert {arm["name"] for arm in compare(CompareConfig((str(tmp_path),)))["arms"]} == {name, "other"}

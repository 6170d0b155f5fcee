"""What travels beside the tensors: every fact through every door, checked by timm and transformers where they read it.

Doors: a run's checkpoint, encoder.safetensors, three exports, a timm model name, a folder of transformers, a .pth.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from tiny import QUICK, tiny

from mae_et import checkpoint, interop, record
from mae_et.checkpoint import Pretrained, read_pretrained, write_export
from mae_et.data.labelled import EvalCrops
from mae_et.data.sources import open_source
from mae_et.engine.pretrain import pretrain
from mae_et.engine.runtime import Runtime
from mae_et.evaluate.config import FinetuneConfig
from mae_et.evaluate.encoder import build_classifier, load_encoder
from mae_et.evaluate.finetune import finetune
from mae_et.model import MaskedAutoencoder
from mae_et.plan.shapes import ModelShape
from mae_et.record import WeightsRecord, to_timm

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
RANGE = (776.0, 1009.0)
CLASSES = ("zebra", "ant", "cat")
#: 4 heads at width 64 are not what is usual, 1e-5 is nobody's default.
SHAPE = ModelShape(
    img_size=32,
    patch_size=8,
    embed_dim=64,
    depth=2,
    num_heads=4,
    decoder_embed_dim=32,
    decoder_depth=1,
    decoder_num_heads=2,
    norm_eps=1e-5,
)
FACTS = WeightsRecord(MEAN, STD, RANGE, 0.5, "bilinear")


def pretrained(classes: bool, pooled: bool = False, shape: ModelShape = SHAPE) -> Pretrained:
    """Weights with every fact, as a run or a fine-tuning of ours leaves them."""
    torch.manual_seed(0)
    state = MaskedAutoencoder(**shape).state_dict()
    if not classes:
        return Pretrained(state, shape, True, "test", True, "pixel", FACTS)
    head = {"head.weight": torch.randn(3, 64), "head.bias": torch.randn(3)}
    if pooled:
        head |= {"fc_norm.weight": torch.rand(64) + 0.5, "fc_norm.bias": torch.randn(64)}
    facts = replace(FACTS, classes=CLASSES, pooled=pooled)
    return Pretrained(interop.encoder_only(state), shape, False, "test", record=facts, head=head)


def exported(source: Pretrained, door: str, folder: Path) -> Path:
    out = folder / {"timm file": "w.safetensors", "facebook": "w.pth"}.get(door, "w")
    write_export(source, source.shape, door.split()[0], out)
    return out


DOORS = ("timm file", "timm folder", "facebook", "huggingface")
#: Fact -> doors that have a place for it. Decoders and what they predict don't fit into timm.
FACTS_AND_DOORS = {
    "mean": DOORS,
    "std": DOORS,
    "crop_pct": DOORS,
    "interpolation": DOORS,
    "value_range": DOORS,
    "num_heads": DOORS,
    "norm_eps": DOORS,
    "img_size": DOORS,
    "norm_pix_loss": ("facebook", "huggingface"),
    "target": ("facebook", "huggingface"),
}


@pytest.mark.parametrize(("fact", "door"), [(f, d) for f, doors in FACTS_AND_DOORS.items() for d in doors])
def test_every_fact_comes_back_through_every_export(fact, door, tmp_path):
    source = pretrained(classes=False)
    found = read_pretrained(exported(source, door, tmp_path))

    def value(weights: Pretrained):
        holders = (weights.record, weights.shape, weights)
        return next(getattr(holder, fact) for holder in holders if hasattr(holder, fact))

    assert value(found) == value(source) is not None


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_a_classifier_and_its_class_names_come_back(door, pooled, tmp_path):
    source = pretrained(classes=True, pooled=pooled)
    if door == "huggingface" and pooled:
        with pytest.raises(ValueError, match=r"classifies the class token.*--cls_token.*--encoder_only"):
            exported(source, door, tmp_path)
        assert not any(tmp_path.iterdir())
        return
    found = read_pretrained(exported(source, door, tmp_path), encoder_only=True)
    assert (found.record.classes, found.record.pooled) == (CLASSES, pooled)
    assert found.head.keys() == source.head.keys()
    assert all(torch.equal(found.head[key], source.head[key]) for key in found.head)
    write_export(source, source.shape, "timm", tmp_path / "bare.safetensors", encoder_only=True)
    bare = read_pretrained(tmp_path / "bare.safetensors")
    assert (bare.head, bare.record.classes, bare.record.mean) == ({}, None, MEAN)


@pytest.mark.parametrize("pooled", [False, True])
def test_timm_builds_a_classifier_from_the_folder_and_looks_at_images_as_we_do(pooled, tmp_path):
    source = pretrained(True, pooled, replace(SHAPE, norm_eps=1e-6))
    folder = exported(source, "timm folder", tmp_path)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_model_data_config(theirs)
    assert (tuple(config["mean"]), tuple(config["std"]), config["crop_pct"]) == (MEAN, STD, 0.5)
    assert (tuple(config["input_size"]), config["interpolation"]) == ((3, 32, 32), "bilinear")
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES)
    start = load_encoder(FinetuneConfig(finetune=str(folder), data_path="D"))
    ours = build_classifier(start, 3, pooled, head=start.head).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))
    wanted = create_transform(**config, is_training=False)(picture)
    assert_same_view(start, picture, wanted, tmp_path)


def assert_same_view(start, picture: Image.Image, wanted: torch.Tensor, folder: Path) -> None:
    """A picture normalised as evaluation does it, next to what another library makes of it."""
    (folder / "train" / "a").mkdir(parents=True)
    picture.save(folder / "train" / "a" / "0.png")
    facts = start.record
    crops = EvalCrops(open_source(folder), (32, 32), 3, facts.crop_pct, facts.value_range, facts.interpolation)
    pixels = crops[0][0].float() / 255
    mine = (pixels - torch.tensor(facts.mean)[:, None, None]) / torch.tensor(facts.std)[:, None, None]
    assert (mine - wanted).abs().mean() < 0.02


def test_transformers_processes_images_as_we_do_and_keeps_eps_and_labels(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = pretrained(classes=True)
    folder = exported(source, "huggingface", tmp_path)
    theirs = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    assert [theirs.config.id2label[i] for i in range(3)] == list(CLASSES)
    assert theirs.config.layer_norm_eps == 1e-5
    start = load_encoder(FinetuneConfig(finetune=str(folder), data_path="D"))
    ours = build_classifier(start, 3, False, head=start.head).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-4)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))
    wanted = torch.as_tensor(np.array(processor(picture)["pixel_values"][0]))
    assert_same_view(start, picture, wanted, tmp_path)


def test_vit_mae_of_another_eps_gives_transformers_own_features(tmp_path):
    """facebook's ViTMAE on the Hub has 1e-12 in its config.json; 1e-6 gives other features."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        **{"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 256, "layer_norm_eps": 0.1, "mask_ratio": 0.0},
    )
    theirs = transformers.ViTMAEModel(config).eval()
    theirs.save_pretrained(tmp_path)
    found = read_pretrained(tmp_path, encoder_only=True)
    assert found.shape.norm_eps == 0.1
    ours = MaskedAutoencoder(**found.shape).eval()
    ours.load_state_dict(found.state, strict=False)
    images, noise = torch.randn(2, 3, 32, 32), torch.linspace(0, 1, 16).expand(2, -1)
    with torch.no_grad():
        wanted = theirs(images, noise=noise).last_hidden_state
        torch.testing.assert_close(ours.encode(images), wanted, rtol=1e-4, atol=1e-4)


def test_a_vit_mae_folder_is_normalised_as_its_preprocessor_says(tmp_path, caplog):
    folder = exported(pretrained(classes=False), "huggingface", tmp_path)
    start = load_encoder(FinetuneConfig(finetune=str(folder), data_path="D"))
    assert (start.mean, start.std) == (MEAN, STD)
    with caplog.at_level("INFO", logger="mae_et"):
        start.log_record()
    assert f"mean 0.1 0.2 0.3, from {folder / 'preprocessor_config.json'}" in caplog.text
    (folder / "preprocessor_config.json").unlink()
    assert load_encoder(FinetuneConfig(finetune=str(folder), data_path="D")).mean == (0.485, 0.456, 0.406)
    flagged = load_encoder(FinetuneConfig(finetune=str(folder), data_path="D", mean=(0.7, 0.7, 0.7)))
    assert (flagged.mean, flagged.sources["mean"]) == ((0.7, 0.7, 0.7), "flags")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_224.mae", "deit_tiny_patch16_224"])
def test_a_timm_name_is_normalised_and_cropped_as_timm_says(name, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda n, **kwargs: create(n, **kwargs | {"pretrained": False}))
    found, config = read_pretrained(name), resolve_model_data_config(create(name))
    assert (found.record.mean, found.record.std) == (config["mean"], config["std"])
    assert (found.record.crop_pct, found.record.interpolation) == (config["crop_pct"], config["interpolation"])
    assert found.shape.img_size == config["input_size"][1]
    start = load_encoder(FinetuneConfig(finetune=name, data_path="D"))
    assert (start.mean, start.record.crop_pct) == (config["mean"], config["crop_pct"])


def test_a_run_and_its_copied_encoder_keep_what_pretraining_was_told(photos, tmp_path):
    run = pretrain(tiny(photos, tmp_path / "run", mean=MEAN, std=STD, value_range=RANGE, epochs=0.5))
    shutil.copy(run / "encoder.safetensors", tmp_path / "elsewhere.safetensors")
    for door in (run, run / "checkpoint.pt", run / "encoder.safetensors", tmp_path / "elsewhere.safetensors"):
        start = load_encoder(FinetuneConfig(finetune=str(door), data_path="D"))
        assert (start.mean, start.std, start.record.value_range) == (MEAN, STD, RANGE), door
        assert start.shape.num_heads == 2


def test_arguments_of_facebookresearch_mae_are_read(tmp_path):
    state = interop.to_facebook(MaskedAutoencoder(**replace(SHAPE, norm_eps=1e-6)).state_dict())
    args = argparse.Namespace(norm_pix_loss=True, input_size=32, model="mae_vit_base_patch16")
    torch.save({"model": state, "args": args, "epoch": 3}, tmp_path / "theirs.pth")
    found = read_pretrained(tmp_path / "theirs.pth", num_heads=4)
    assert (found.norm_pix_loss, found.target, found.record.mean) == (True, "pixel", None)
    assert load_encoder(
        FinetuneConfig(finetune=str(tmp_path / "theirs.pth"), data_path="D", num_heads=4)
    ).mean == pytest.approx((0.485, 0.456, 0.406))


def test_a_guessed_number_of_heads_is_said_for_every_width(tmp_path, caplog):
    """A ViT-S of MoCo v3 has 12 heads at 384, not 6."""
    shape = replace(SHAPE, embed_dim=384, num_heads=12, depth=1, norm_eps=1e-6)
    torch.save(interop.to_timm(MaskedAutoencoder(**shape).state_dict()), tmp_path / "s.pth")
    assert read_pretrained(tmp_path / "s.pth").shape.num_heads == 6
    assert "doesn't say how many heads it has: taken to be 6, of 64 each; see --num_heads" in caplog.text
    caplog.clear()
    assert read_pretrained(tmp_path / "s.pth", num_heads=12).shape.num_heads == 12
    assert not caplog.text


def test_means_of_0_to_255_are_refused():
    for config in (
        lambda: tiny(Path("D"), Path("o"), mean=(123.675, 116.28, 103.53)),
        lambda: FinetuneConfig(std=(58.4,)),
    ):
        with pytest.raises(ValueError, match=r"--(mean|std) .*pixels are in \[0, 1\] here; divide by 255"):
            config()


def test_fine_tuning_keeps_every_fact_of_the_weights_it_began_with(pictures, tmp_path):
    """From transformers' folder to our checkpoint, best.pt and a timm file: eps, heads, mean, crop, interpolation …"""
    folder = exported(pretrained(classes=False), "huggingface", tmp_path)
    flags = QUICK | {"epochs": 1, "data_path": str(pictures), "output_dir": str(tmp_path / "tuned"), "cls_token": True}
    finetune(FinetuneConfig(finetune=str(folder), value_range=RANGE, input_size=40, **flags))
    for file in ("checkpoint.pt", "best.pt"):
        found = read_pretrained(tmp_path / "tuned" / file, encoder_only=True)
        facts = found.record
        assert (facts.mean, facts.std, facts.value_range) == (MEAN, STD, RANGE)
        assert (facts.crop_pct, facts.interpolation) == (0.5, "bilinear")
        assert (facts.classes, facts.pooled) == (("blue", "green", "red"), False)
        assert (found.shape.img_size, found.shape.num_heads, found.shape.norm_eps) == (40, 4, 1e-5)
        assert found.head["head.weight"].shape == (3, 64)
    again = exported(found, "timm file", tmp_path)
    assert read_pretrained(again).record == facts and read_pretrained(again).shape.norm_eps == 1e-5
    result = json.loads((tmp_path / "tuned" / "eval-finetune.json").read_text())
    assert WeightsRecord.of(result["record"]).mean == MEAN and result["input_size"] == 40


# ── classes, by name ──


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A run fine-tuned with --crop_pct on pictures of three colours that it tells apart without fail."""
    root = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        **{"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16},
        **{"decoder_depth": 1, "decoder_num_heads": 2},
    )
    checkpoint.save_safetensors(interop.to_timm(model.state_dict()), root / "encoder.safetensors")
    colours(root / "data", {"blue": 2, "green": 1, "red": 0})
    flags = QUICK | {"epochs": 30, "lr": 3e-3, "mixup": 0, "cutmix": 0, "reprob": 0, "aa": "none", "drop_path": 0}
    config = FinetuneConfig(
        **flags | {"finetune": str(root / "encoder.safetensors"), "num_heads": 2, "crop_pct": 0.6},
        data_path=str(root / "data"),
        output_dir=str(root / "run"),
    )
    path = finetune(config)
    assert json.loads(path.read_text())["top1"] == 100
    return root / "run"


def colours(root: Path, channels: dict[str, int], splits: tuple[str, ...] = ("train", "val")) -> Path:
    rng = np.random.default_rng(0)
    for split in splits:
        for name, channel in channels.items():
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 60, (24, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def judged(tuned: Path, data: Path, **changes) -> dict:
    flags = {name: value for name, value in QUICK.items() if name in ("device", "precision", "num_workers")}
    path = finetune(FinetuneConfig(**flags | {"eval": True, "finetune": str(tuned), "data_path": str(data)} | changes))
    return json.loads(path.read_text())


def test_a_class_is_known_by_its_name_wherever_it_stands(tuned, tmp_path):
    """Sorted, the folders of these data are in another order than those the model was trained on, or fewer."""
    others = colours(tmp_path / "others", {"green": 1, "blue": 2}, ("val",))
    result = judged(tuned, others)
    assert (result["top1"], result["num_images"], result["num_classes"]) == (100, 8, 3)
    only = colours(tmp_path / "only", {"red": 0})
    assert judged(tuned, only, report=True)["per_class_accuracy"] == {"blue": None, "green": None, "red": 100}


def test_unknown_classes_are_refused_by_name(tuned, tmp_path):
    data = colours(tmp_path / "data", {"azure": 2, "green": 1, "red": 0}, ("val",))
    with pytest.raises(ValueError, match=r"class\(es\) azure are unknown to .*run, which has blue, green, red"):
        judged(tuned, data)


def test_splits_that_number_their_classes_differently_are_matched(tuned, tmp_path):
    """A tar numbers in natural order, a folder in alphabetical order."""
    data = colours(tmp_path / "data", {"c1": 0, "c10": 1, "c2": 2})
    source = open_source(data, "val")
    from mae_et.evaluate.classes import with_classes

    matched = with_classes(source, ["c1", "c2", "c10"], "D", "the model")
    names = [source.classes[label] for label in source.labels]
    assert [matched.classes[label] for label in matched.labels] == names
    assert [matched.classes[matched.read(i)[1]] for i in range(len(matched))] == names


def test_the_crop_that_a_model_was_judged_by_is_the_crop_it_is_judged_by_again(tuned):
    result = judged(tuned, tuned.parent / "data")
    assert result["record"]["crop_pct"] == 0.6
    assert result["record"]["classes"] == ["blue", "green", "red"] and result["record"]["mean"]
    assert judged(tuned, tuned.parent / "data", crop_pct=0.9)["record"]["crop_pct"] == 0.9
    assert checkpoint.load(tuned / "checkpoint.pt")["crop_pct"] == 0.6


def test_records_lose_nothing_on_their_way_through_plain_values():
    facts = replace(FACTS, classes=CLASSES, pooled=True)
    assert WeightsRecord.of(json.loads(json.dumps(facts.to_dict()))) == facts
    assert WeightsRecord().completed_by(facts) == facts
    assert replace(WeightsRecord(), mean=(1.0,)).completed_by(facts).mean == (1.0,)
    assert record.from_preprocessor({"do_normalize": False, "size": 32}, "f").mean == (0, 0, 0)
    assert record.labels_of_huggingface({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) is None


def test_pixels_are_normalised_as_the_preprocessor_does_whatever_it_multiplies_them_by():
    pixel = 100.0
    for rescaling, factor in (({"do_rescale": False}, 1), ({"rescale_factor": 1 / 127.5}, 1 / 127.5), ({}, 1 / 255)):
        facts = record.from_preprocessor(rescaling | {"image_mean": [3.0], "image_std": [0.5]}, "f", 1)
        theirs = (pixel * factor - 3.0) / 0.5
        assert (pixel / 255 - facts.mean[0]) / facts.std[0] == pytest.approx(theirs)
    raw = record.from_preprocessor({"do_normalize": False}, "f", 4)
    assert (raw.mean, raw.std) == ((0,) * 4, (1,) * 4)
    one_number = {"image_mean": 0.5, "image_std": 0.25, "do_rescale": None, "rescale_factor": None, "size": None}
    facts = record.from_preprocessor(one_number, "f", 2)
    assert (facts.mean, facts.std, facts.crop_pct) == ((0.5,) * 2, (0.25,) * 2, None)


def test_a_preprocessor_whose_mean_is_no_list_of_numbers_tells_none():
    facts = record.from_preprocessor({"image_mean": "imagenet", "image_std": [0.5, None, 0.5]}, "f")
    assert (facts.mean, facts.std) == (None, None)


def test_what_others_mean_by_a_fact_that_we_have_no_place_for_is_not_known():
    facts = record.from_timm({"interpolation": "random", "crop_pct": 1.14, "mean": [0.5]}, "f")
    assert (facts.interpolation, facts.crop_pct, facts.mean) == (None, None, (0.5,))
    padded = {"do_center_crop": True, "size": {"shortest_edge": 224}, "crop_size": {"height": 256, "width": 256}}
    assert record.from_preprocessor(padded | {"resample": 4}, "f") == WeightsRecord()


@pytest.mark.parametrize("door", ["timm folder", "facebook"])
def test_a_classifier_without_names_keeps_its_outputs(door, tmp_path):
    source = pretrained(True, shape=replace(SHAPE, norm_eps=1e-6))
    source = replace(source, record=replace(source.record, classes=None))
    out = exported(source, door, tmp_path)
    if door == "facebook":
        assert checkpoint.load(out)["args"]["nb_classes"] == 3
        return
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert torch.equal(model.head.weight, source.head["head.weight"])


def test_facts_of_a_run_are_found_while_its_newest_checkpoint_is_missing(run):
    weights = read_pretrained(run, encoder_only=True)
    write_export(weights, weights.shape, "timm", run / "encoder.safetensors")
    (run / "checkpoint.pt").rename(run / "checkpoint.prev1.pt")
    assert read_pretrained(run / "encoder.safetensors").training["config"]["data_path"]


@pytest.mark.parametrize("content", ["[1, 2]", '{"a": 1}\n{"a": 2}\n', '{"lr": 1e-3}'])
def test_another_file_of_the_same_name_is_no_record(content, tmp_path):
    out = exported(pretrained(classes=False), "facebook", tmp_path)
    out.with_suffix(".json").write_text(content)
    assert read_pretrained(out).record.mean == MEAN


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4])
def test_only_weights_of_colour_pictures_are_for_timm_to_adapt(in_chans):
    """timm before 1.0.31 adapts all that have a first_conv: unless they have 1 or 3 channels, to random ones."""
    cfg = to_timm(WeightsRecord(), replace(SHAPE, in_chans=in_chans), 0)
    assert ("first_conv" in cfg) == (in_chans == 3)


@pytest.mark.parametrize("door", ["args of a .pth", "pretrained_cfg"])
@pytest.mark.parametrize(
    "odd",
    [
        {"mean": 0.5, "std": 0.5},
        {"mean": "imagenet"},
        {"mean": [123.7, 116.3, 103.5], "std": [math.nan, 1, 1]},
        {"classes": 3},
        {"classes": "a,b,c"},
        {"crop_pct": "0.9"},
    ],
)
def test_what_another_program_means_by_a_name_of_ours_is_left_out_and_said(door, odd, caplog):
    if door == "pretrained_cfg":
        facts = record.from_timm({{"classes": "label_names"}.get(k, k): v for k, v in odd.items()}, "f")
    else:
        facts = record.from_facebook(odd | {"global_pool": "avg"}, "f")
        assert "pooled avg, from f, is left out" in caplog.text
    assert facts == WeightsRecord()
    assert all(f"{name} {value}, from f, is left out" in caplog.text for name, value in odd.items())


@pytest.mark.parametrize("kept", [["num_heads"], []])
def test_heads_and_pooling_are_those_of_the_config_beside_weights_of_timm(kept, tmp_path, caplog):
    """Heads are its argument, or those of the model that it names; other poolings than ours are left out."""
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2} | ({"num_heads": 6} if kept else {})
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments, global_pool="avg", fc_norm=False)
    (tmp_path / "timm").mkdir()
    config = {"architecture": "vit_tiny_patch16_224", "global_pool": "avg", "pretrained_cfg": {}}
    (tmp_path / "timm/config.json").write_text(json.dumps(config | {"model_args": arguments}))
    checkpoint.save_safetensors(model.state_dict(), tmp_path / "timm/model.safetensors", {})
    read = read_pretrained(tmp_path / "timm")
    assert read.shape.num_heads == model.blocks[0].attn.num_heads == (6 if kept else 3)
    assert "doesn't say how many heads" not in caplog.text
    assert not read.head and "its classifier pools patches in a way that is not read here" in caplog.text
    mae = MaskedAutoencoder(**read.shape).eval()
    mae.load_state_dict(read.state, strict=False)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mae.encode(images), model.eval().forward_features(images), atol=1e-5, rtol=1e-4)


def test_images_of_12_bits_are_seen_as_the_run_saw_its_own_and_it_is_said(tmp_path, caplog):
    """Before and after export: it was trained without a range, so none is measured; foreign weights get one."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "deep" / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 4096, (20, 20)).astype(np.uint16)
                Image.fromarray(pixels).save(tmp_path / "deep" / split / name / f"{i}.png")
    ours = replace(pretrained(True), record=WeightsRecord((0.5,) * 3, (0.2,) * 3))
    doors = {"timm": tmp_path / "timm", "facebook": tmp_path / "f.pth"}
    for door, path in doors.items():
        write_export(ours, ours.shape, door, path)
    content = checkpoint.load(tmp_path / "f.pth")
    checkpoint.save({"model": content["model"]}, tmp_path / "foreign.pth")
    for path, stretched in ((doors["timm"], False), (doors["facebook"], False), (tmp_path / "foreign.pth", True)):
        caplog.clear()
        encoder = load_encoder(FinetuneConfig(finetune=str(path), data_path=str(tmp_path / "deep"), num_heads=None))
        measured = encoder.with_value_range(
            open_source(str(tmp_path / "deep")), Runtime(torch.device("cpu"), "fp32")
        ).record.value_range
        assert (measured is not None) == stretched and "of 256 levels" in caplog.text
        assert ("was trained on images as they are, so these are not stretched either" in caplog.text) != stretched

"""Checkpoints as other projects write them: the model they mean comes out of every wrapper, and others are named."""

from __future__ import annotations

import argparse
import itertools
import re
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from mae_et import interop
from mae_et.engine.storage import load
from mae_et.files import CheckpointError
from mae_et.model import MaskedAutoencoder
from mae_et.wrappers import unwrap

PATH = Path("some/file.pth")
State = dict[str, Tensor]


def vit(seed: int, **changes) -> VisionTransformer:
    """A small classifier of timm without two equal tensors."""
    torch.manual_seed(seed)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**size | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


MEANT, OTHER = vit(1), vit(2)
RIGHT, WRONG = MEANT.state_dict(), OTHER.state_dict()
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 4)}}, "param_groups": [{"lr": 0.1}]}


def under(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def headless(state: State) -> State:
    return {key: tensor for key, tensor in state.items() if not key.startswith("head.")}


def dino_head(prefix: str) -> State:
    return under(prefix, {"mlp.0.weight": torch.zeros(8, 48), "last_layer.weight_v": torch.zeros(9, 8)})


def checkpointed(model: nn.Module) -> State:
    """As FSDP with activation checkpointing leaves it."""
    names = {"blocks.": "blocks._fsdp_wrapped_module.", "blocks.0.": "blocks.0._checkpoint_wrapped_module."}
    state = model.state_dict()
    for name, wrapped in reversed(names.items()):
        state = {re.sub(f"^{re.escape(name)}", wrapped, key): tensor for key, tensor in state.items()}
    return state


def compiled(model: nn.Module) -> nn.Module:
    """Without the seconds that the default backend takes to load."""
    return torch.compile(model, backend="eager")


def keys(content: dict) -> set[str]:
    """Last parts of two of all names, in whatever dict they are."""
    inner = [keys(value) for value in content.values() if isinstance(value, dict)]
    return set().union({".".join(str(key).split(".")[-2:]) for key in content}, *inner)


#: name -> (content, what the notes say); the right weights are MEANT's.
CHECKPOINTS = {
    "torchvision": (RIGHT, ()),
    "deit": ({"model": RIGHT, "epoch": 3, "args": argparse.Namespace(lr=1)}, ()),
    "timm's train.py": (
        {"epoch": 3, "arch": "vit", "state_dict": WRONG, "optimizer": OPTIMIZER, "state_dict_ema": RIGHT},
        ("state_dict_ema, not of state_dict",),
    ),
    "convnext": ({"model": WRONG, "optimizer": OPTIMIZER, "model_ema": RIGHT}, ("model_ema, not of model",)),
    "timm's train.py without an average": ({"state_dict": RIGHT, "state_dict_ema": None}, ()),
    "data parallel": ({"state_dict": nn.DataParallel(MEANT).state_dict()}, ("module.",)),
    "compiled": ({"model": compiled(MEANT).state_dict()}, ("_orig_mod.",)),
    "compiled data parallel": (compiled(nn.DataParallel(MEANT)).state_dict(), ("_orig_mod.", "module.")),
    "data parallel compiled": (nn.DataParallel(compiled(MEANT)).state_dict(), ("_orig_mod.", "module.")),
    "stochastic weight averaging": (AveragedModel(MEANT).state_dict(), ("module.", "left out n_averaged (1)")),
    "compiled blocks": (
        {key.replace("blocks.0.", "blocks.0._orig_mod."): t for key, t in RIGHT.items()},
        ("_orig_mod",),
    ),
    "activation checkpointing": (checkpoint_wrapper(MEANT).state_dict(), ()),
    "fsdp": (checkpointed(MEANT), ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")),
    "lightning": (
        {
            "pytorch-lightning_version": "2.0",
            "state_dict": under("model.", RIGHT) | {"criterion.centers.weight": torch.zeros(3, 3)},
            "hyper_parameters": {"lr": 0.1},
        },
        ("model.", "left out criterion (1)"),
    ),
    "deepspeed": ({"module": RIGHT, "dp_world_size": 8, "optimizer": OPTIMIZER}, ()),
    "twice": ({"model": {"model": RIGHT}, "epoch": 3}, ()),
    "a net": ({"net": RIGHT, "acc": 0.9}, ()),
    "a backbone": ({"backbone": RIGHT, "head": {"weight": torch.zeros(2, 2)}}, ()),
    "a name of its own": ({"vit_of_last_week": RIGHT, "optimizer": OPTIMIZER}, ()),
    "a name of its own beside others": (
        {"vit": RIGHT, "dino_loss": {"center": torch.zeros(1, 9)}, "random.state": {"torch.cpu": torch.zeros(9)}},
        (),
    ),
    "an average inside the model": (RIGHT | under("average.", WRONG), ("left out average (32)",)),
    "parameters": ({"model": dict(MEANT.named_parameters())}, ()),
    "dino": (
        {
            "student": under("module.backbone.", headless(WRONG)) | dino_head("module.head."),
            "teacher": under("backbone.", headless(RIGHT)) | dino_head("head."),
            "optimizer": OPTIMIZER,
            "dino_loss": {"center": torch.zeros(1, 9)},
        },
        ("teacher, not of student", "stripped backbone.", "left out head (2)"),
    ),
    "dino's head in the backbone": (headless(RIGHT) | dino_head("head."), ("head (2): no linear classifier",)),
    "dinov2's training of a plain ViT": (
        {
            "model": under("student.backbone.", headless(WRONG))
            | under("teacher.backbone.", headless(RIGHT))
            | dino_head("teacher.dino_head.")
        },
        ("stripped teacher.backbone.", "student.backbone (30)", "teacher.dino_head (2)"),
    ),
    "ibot": ({"state_dict": headless(RIGHT) | {"masked_embed": torch.zeros(1, 48)}}, ("masked_embed (1)",)),
    "moco v3": (
        {
            "state_dict": under("module.base_encoder.", headless(RIGHT) | {"head.0.weight": torch.zeros(8, 48)})
            | under("module.momentum_encoder.", headless(WRONG))
            | {"module.predictor.0.weight": torch.zeros(8, 8), "module.predictor.1.running_mean": torch.zeros(8)}
        },
        (
            "stripped module.base_encoder.",
            "module.momentum_encoder (30), module.predictor (2)",
            "head (1): no linear classifier",
        ),
    ),
    "moco": (under("module.encoder_q.", RIGHT) | under("module.encoder_k.", WRONG), ("encoder_q.", "encoder_k (32)")),
    "byol": (
        under("online_network.backbone.", RIGHT) | under("target_network.backbone.", WRONG),
        ("online_network.backbone.", "target_network.backbone (32)"),
    ),
    "msn": (
        {
            "target_encoder": under("module.", RIGHT),
            "encoder": under("module.", WRONG),
            "prototypes": torch.zeros(9, 8),
        },
        ("target_encoder, not of encoder",),
    ),
    "averaged in one dict": (under("model.", WRONG) | under("ema.", RIGHT), ("stripped ema.", "left out model (32)")),
    "facebook's linear probe": (
        {"model": headless(RIGHT) | {"head.0.running_mean": torch.zeros(48), "head.1.weight": torch.zeros(5, 48)}},
        ("head (2): no linear classifier",),
    ),
    "an encoder with a projector": (
        under("encoder.", RIGHT) | {"projector.0.weight": torch.zeros(8, 48)},
        ("stripped encoder.", "projector (1)"),
    ),
}


@cache
def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_model_that_is_meant_comes_out_with_its_features(name):
    content, said = CHECKPOINTS[name]
    found = unwrap(content, PATH)
    for read in (interop.from_timm, interop.from_facebook):
        model = vit(3, num_classes=0)
        model.load_state_dict(interop.to_timm(read(found.state)))
        assert all(torch.equal(tensor, RIGHT[key]) for key, tensor in model.state_dict().items())
        torch.testing.assert_close(model.forward_features(image()), MEANT.forward_features(image()))
    notes = "; ".join(found.notes)
    assert all(part in notes for part in said), notes
    assert said or not notes, "what is plain needs no note"
    assert all("\n" not in note for note in found.notes)


@pytest.mark.parametrize("name", [name for name, (content, _) in CHECKPOINTS.items() if "head.bias" in keys(content)])
def test_a_classifier_keeps_its_head(name):
    state = unwrap(CHECKPOINTS[name][0], PATH).state
    assert torch.equal(MEANT.head.weight, state["head.weight"]) and torch.equal(MEANT.head.bias, state["head.bias"])


def test_the_choice_is_that_of_timm(tmp_path):
    """Every set of the names that timm knows, each with weights of its own."""
    names = ("state_dict_ema", "model_ema", "state_dict", "model")
    own = {
        name: under("module.", {"patch_embed.proj.weight": torch.full((1, 1, 1, 1), n)}) for n, name in enumerate(names)
    }
    own = {name: state | {"module.cls_token": state["module.patch_embed.proj.weight"]} for name, state in own.items()}
    for number in range(1, 5):
        for chosen in itertools.combinations(names, number):
            content = {"epoch": 3} | {name: own[name] for name in reversed(chosen)}
            torch.save(content, tmp_path / "file.pth")
            theirs = load_state_dict(str(tmp_path / "file.pth"))
            ours = unwrap(load(tmp_path / "file.pth"), PATH).state
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), chosen


def test_what_is_beside_comes_from_the_outermost_level():
    inner = {"model": RIGHT, "epoch": 2, "arch": "vit"}
    found = unwrap({"checkpoint": inner, "epoch": 3, "optimizer": OPTIMIZER, "scaler": None}, PATH)
    assert found.beside == {"epoch": 3, "arch": "vit", "optimizer": OPTIMIZER, "scaler": None}
    assert unwrap(RIGHT | {"epoch": 3}, PATH).beside == {"epoch": 3}
    assert unwrap({"model": WRONG, "model_ema": RIGHT}, PATH).beside.keys() == {"model"}


# Layouts under any prefix


def small_mae(**changes) -> State:
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return MaskedAutoencoder(
        **shape | {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2} | changes
    ).state_dict()


OURS = {"self": small_mae(), "cross": small_mae(decoder="cross")}
WRAPPERS = ("module", "_orig_mod", "model", "backbone", "net", "student", "encoder", "online_network", "vision_tower")


@pytest.mark.parametrize("decoder", OURS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model.net."])
def test_our_own_layout_keeps_its_encoder(decoder, prefix):
    state = OURS[decoder]
    found = unwrap({"model": under(prefix, state)}, PATH).state
    assert found.keys() == state.keys() and all(found[key] is state[key] for key in state)
    if not prefix:
        encoder = interop.encoder_only(state)
        assert unwrap(encoder, PATH).state.keys() == encoder.keys()


@settings(max_examples=60)
@given(
    parts=st.lists(st.sampled_from(WRAPPERS), max_size=4),
    layout=st.sampled_from(["facebook", "timm", "ours", "hub", "memory", "transformers5_file"]),
    encoder_only=st.booleans(),
)
def test_any_nesting_of_wrappers_is_undone(parts, layout, encoder_only):
    state = OURS["self"]
    wanted = interop.encoder_only(state) if encoder_only or layout == "timm" else state
    if layout in ("facebook", "timm"):
        theirs, read = (
            (interop.to_timm(state), interop.from_timm) if layout == "timm" else (None, interop.from_facebook)
        )
        theirs = theirs or interop.to_facebook(wanted)
    elif layout == "ours":
        theirs, read = wanted, interop.from_timm
    else:
        theirs, read = interop.to_huggingface(wanted, naming=layout), interop.from_huggingface
    prefix = "".join(f"{part}." for part in parts)
    found = unwrap({"state_dict": under(prefix, theirs)}, PATH).state
    found = found if "encoder.cls_token" in found else read(found)  # a wrapper named so makes an encoder ours
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


# What can't be read


#: timm's name, or a model of transformers -> what the error calls it.
FOREIGN_MODELS = {
    "vit_small_patch14_dinov2": "DINOv2",
    "vit_small_patch14_reg4_dinov2": "registers",
    "vit_small_patch16_dinov3": "DINOv3",
    "deit3_small_patch16_224": "DeiT III",
    "deit_tiny_distilled_patch16_224": "distilled DeiT",
    "beit_base_patch16_224": "BEiT",
    "eva02_tiny_patch14_224": "EVA",
    "eva02_base_patch14_224": "EVA-02",
    "swin_tiny_patch4_window7_224": "Swin",
    "swinv2_tiny_window8_256": "Swin",
    "convnext_tiny": "ConvNeXt",
    "convnextv2_tiny": "ConvNeXt V2",
    "resnet18": "ResNet",
    "resnet50": "ResNet",
    "efficientnet_b0": "convolutional network",
    "vit_base_patch16_clip_224": "CLIP",
    "vit_base_patch16_siglip_224": "SigLIP",
    "samvit_base_patch16": "SAM",
    "cait_xxs24_224": "CaiT",
    "hiera_tiny_224": "Hiera",
    "pvt_v2_b0": "PVT",
    "Dinov2": "DINOv2",
    "Beit": "BEiT",
    "CLIPVision": "CLIP",
    "DeiT": "distilled DeiT",
    "ConvNext": "ConvNeXt",
    "ResNet": "ResNet",
    "IJepa": "I-JEPA",
    "VideoMAE": "videos",
}
#: Names of files that no library at hand can build, as their projects publish them.
PUBLISHED = [
    ("this is a DINOv2 (layer scale", ("mask_token", "cls_token", "patch_embed.proj.weight", "blocks.0.ls1.gamma")),
    ("this is a DINOv2 (layer scale", ("mask_token", "patch_embed.proj.weight", "blocks.0.11.ls1.gamma")),
    ("this is a DINOv3", ("cls_token", "storage_tokens", "rope_embed.periods", "patch_embed.proj.weight")),
    ("this is a BEiT", ("cls_token", "patch_embed.proj.weight", "rel_pos_bias.relative_position_bias_table")),
    ("this is a BEiT", ("cls_token", "patch_embed.proj.weight", "blocks.0.gamma_1", "blocks.0.attn.q_bias")),
    ("this is a SimMIM", ("encoder.mask_token", "encoder.patch_embed.proj.weight", "decoder.0.weight")),
    ("this is a VideoMAE", ("encoder.patch_embed.proj.weight", "encoder_to_decoder.weight")),
    ("this is a CLIP", ("visual.class_embedding", "visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight")),
    ("this is a CLIP with a ResNet", ("visual.attnpool.q_proj.weight", "visual.layer1.0.conv1.weight")),
    ("this is a SigLIP", ("vision_model.embeddings.patch_embedding.weight", "vision_model.head.probe")),
    ("this is a ViT of mmpretrain", ("backbone.cls_token", "backbone.layers.0.ln1.weight", "neck.mask_token")),
    ("this is a ViT of torchvision", ("class_token", "conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight")),
    ("I-JEPA", ("module.patch_embed.proj.weight", "module.pos_embed", "module.blocks.0.norm1.weight")),
    ("LoRA", ("base_model.model.patch_embed.proj.weight", "base_model.model.blocks.0.attn.qkv.lora_A.default.weight")),
    ("this is a Hiera", ("patch_embed.proj.weight", "pos_embed_spatial", "blocks.0.norm1.weight")),
    ("this is a ConvMAE", ("patch_embed1.proj.weight", "blocks1.0.norm1.weight")),
    ("normalised queries", ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.q_norm.weight")),
]


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    assert all(part in str(error.value) for part in (str(PATH), *parts)) and "\n" not in str(error.value)


@cache
def foreign(model: str) -> State:
    with torch.device("meta"):
        if model[0].isupper():
            return getattr(transformers, f"{model}Model")(getattr(transformers, f"{model}Config")()).state_dict()
        return timm.create_model(model).state_dict()


@pytest.mark.parametrize("model", FOREIGN_MODELS)
@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_other_models_are_named(model, prefix):
    with pytest.raises(ValueError, match=r"this is an? .* only a plain ViT or an MAE can be read") as error:
        unwrap({"model": under(prefix, foreign(model))}, PATH)
    one_line(error, FOREIGN_MODELS[model])


@pytest.mark.parametrize(("said", "names"), PUBLISHED)
def test_published_files_of_other_models_are_named(said, names):
    with pytest.raises(ValueError, match="only a plain ViT or an MAE can be read") as error:
        unwrap({"model": dict.fromkeys(names, torch.zeros(2, 2))}, PATH)
    one_line(error, said)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_giant_patch14_224"])
def test_plain_vits_are_not_taken_for_others(name):
    with torch.device("meta"):
        state = timm.create_model(name, depth=2).state_dict()
    assert unwrap(state, PATH).state.keys() == state.keys()


@pytest.mark.parametrize(
    "content", [{}, {"step": 3}, {"optimizer": OPTIMIZER}, {"model": {}}, {"model": "vit", "a": [RIGHT]}]
)
def test_no_weights_is_one_line(content):
    with pytest.raises(CheckpointError, match="holds no weights") as error:
        unwrap(content, PATH)
    one_line(error, *content)


@pytest.mark.parametrize("content", [{"first": RIGHT, "second": WRONG}, under("one.", RIGHT) | under("two.", WRONG)])
def test_several_models_are_never_chosen_from_in_silence(content):
    with pytest.raises(ValueError, match=r"holds several models, (first, second|one\., two\.)") as error:
        unwrap(content, PATH)
    one_line(error, "save one of them alone")

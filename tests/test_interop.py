"""Adapters: round trips are the identity, others load our exports and compute the same, and wrong dicts are refused."""

from __future__ import annotations

import json
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et import checkpoint, interop
from mae_et.model import MaskedAutoencoder, create_mae
from mae_et.targets import pixel_target, reconstruction_loss

PAIRS = {
    "facebook": (interop.to_facebook, interop.from_facebook),
    **{
        f"huggingface-{naming}": (
            lambda state, naming=naming: interop.to_huggingface(state, naming=naming),
            interop.from_huggingface,
        )
        for naming in interop.HF_NAMINGS
    },
}


def small_mae(**overrides) -> MaskedAutoencoder:
    """A small model in which no weight but the position table is at its initial value."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    shape |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}
    model = MaskedAutoencoder(**shape | overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "encoder.pos_embed":
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def assert_identical(found: dict, wanted: dict) -> None:
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def facebook_keys(depth: int, decoder_depth: int) -> set[str]:
    """The key names of a facebookresearch/mae pretraining checkpoint, written out by hand."""
    keys = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    modules = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    for prefix, blocks in (("blocks", depth), ("decoder_blocks", decoder_depth)):
        for n in range(blocks):
            modules += [f"{prefix}.{n}.{m}" for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    return keys | {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


@settings(max_examples=12)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    depth=st.integers(1, 12),
    decoder_depth=st.integers(1, 3),
    widths=st.sampled_from([(8, 16), (16, 8)]),
    in_chans=st.sampled_from([1, 3, 4]),
    encoder_only=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_round_trips_are_the_identity(grid, depth, decoder_depth, widths, in_chans, encoder_only, dtype):
    state = small_mae(
        img_size=(grid[0] * 4, grid[1] * 4),
        patch_size=4,
        in_chans=in_chans,
        embed_dim=widths[0],
        depth=depth,
        num_heads=2,
        decoder_embed_dim=widths[1],
        decoder_depth=decoder_depth,
    ).state_dict()
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    assert_identical(interop.from_timm(interop.to_timm(state)), interop.encoder_only(state))
    state = interop.encoder_only(state) if encoder_only else state
    for write, read in PAIRS.values():
        theirs = write(state)
        assert {tensor.dtype for tensor in theirs.values()} == {dtype}
        ours = read(theirs)
        assert_identical(ours, state)
        assert_identical(write(ours), theirs)


@pytest.mark.parametrize("encoder_only", [False, True])
def test_facebook_has_the_keys_of_its_checkpoints(encoder_only):
    state = small_mae().state_dict()
    keys = facebook_keys(2, 1)
    if encoder_only:
        state = interop.encoder_only(state)
        keys = {key for key in keys if not key.startswith(("decoder", "mask_token"))}
    exported = interop.to_facebook(state)
    assert set(exported) == keys
    if not encoder_only:
        assert exported["decoder_pos_embed"].shape == (1, 17, 32)
        assert not exported["decoder_pos_embed"][:, 0].any()


@pytest.mark.parametrize("pooled", [False, True])
def test_facebook_fine_tuned_gives_the_encoder(pooled):
    encoder = interop.encoder_only(small_mae().state_dict())
    tuned = interop.to_facebook(encoder)
    if pooled:
        tuned = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: t for key, t in tuned.items()}
        assert "fc_norm.weight" in tuned
    tuned |= {"head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}
    assert_identical(interop.from_facebook(tuned), encoder)
    assert_identical(interop.from_timm(tuned), encoder)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_dict_with_a_key_too_few_or_too_many_is_refused(pair):
    write, read = PAIRS[pair]
    complete = write(small_mae().state_dict())
    for key in complete:
        partial = {k: t for k, t in complete.items() if k != key}
        with pytest.raises(ValueError, match="1 missing") as error:
            read(partial)
        assert f"(first: {key})" in str(error.value)
        assert "unexpected" not in str(error.value)
    with pytest.raises(ValueError, match=r"2 unexpected \(first: extra\.2\)"):
        read(complete | {"extra.2": torch.zeros(1), "extra.10": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing"):
        read({})


def test_our_own_dicts_are_checked_too():
    state = small_mae().state_dict()
    del state["encoder.blocks.1.attn.qkv.bias"], state["decoder_pred.bias"]
    for convert in (interop.to_timm, interop.to_facebook, interop.to_huggingface, interop.infer_shape):
        with pytest.raises(ValueError, match=r"2 missing \(first: decoder_pred\.bias\)"):
            convert(state)


def test_a_timm_vit_that_is_not_plain_is_refused():
    scaled = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, init_values=0.1
    )
    with pytest.raises(ValueError, match=r"2 unexpected \(first: blocks\.0\.ls1\.gamma\)"):
        interop.from_timm(scaled.state_dict())


@pytest.mark.parametrize("pair", PAIRS)
def test_position_tables_are_never_lost(pair):
    write, read = PAIRS[pair]
    theirs = write(small_mae().state_dict())
    decoder_table = next(key for key in theirs if key.endswith("decoder_pos_embed"))
    encoder_table = next(
        key for key in theirs if key.endswith(("position_embeddings", "pos_embed")) and "dec" not in key
    )

    near = theirs | {decoder_table: theirs[decoder_table] + 5e-6}
    assert "decoder_pos_embed" not in read(near)
    for other in (theirs[decoder_table] + 1e-4, theirs[decoder_table] * float("nan"), theirs[decoder_table][:, :-1]):
        with pytest.raises(ValueError, match=f"{decoder_table} .* sin-cos"):
            read(theirs | {decoder_table: other})

    learned = torch.randn_like(theirs[encoder_table])
    assert torch.equal(read(theirs | {encoder_table: learned})["encoder.pos_embed"], learned)


def test_a_learned_table_that_is_not_square_needs_the_size():
    state = small_mae(img_size=(16, 40)).state_dict()
    assert interop.infer_shape(state, num_heads=3)["img_size"] == (16, 40)
    state["encoder.pos_embed"] = torch.randn_like(state["encoder.pos_embed"])
    with pytest.raises(ValueError, match="pass img_size"):
        interop.infer_shape(state, num_heads=3)
    assert interop.infer_shape(state, num_heads=3, img_size=(16, 40))["img_size"] == (16, 40)
    with pytest.raises(ValueError, match="16 patches, the weights 10"):
        interop.infer_shape(state, num_heads=3, img_size=32)


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch16", "mae_vit_base_patch16", "mae_vit_huge_patch14"])
def test_inferred_shape_builds_the_same_model(name):
    with torch.device("meta"):
        model = create_mae(name)
    tables = {"encoder.pos_embed": torch.randn(model.encoder.pos_embed.shape)}
    shape = interop.infer_shape(model.state_dict() | tables)
    wanted = {key: getattr(model, key) for key in shape}
    assert shape == wanted


def test_inferred_shape_of_other_models():
    model = small_mae(mlp_ratio=2.0, in_chans=4, target_dim=11, img_size=(16, 24))
    state = model.state_dict()
    shape = interop.infer_shape(state, num_heads=3, decoder_num_heads=4)
    assert shape == {key: getattr(model, key) for key in shape}
    MaskedAutoencoder(**shape).load_state_dict(state)
    assert not [key for key in interop.infer_shape(interop.encoder_only(state), num_heads=3) if "decoder" in key]
    with pytest.raises(ValueError, match="pass num_heads"):
        interop.infer_shape(state)


def test_huggingface_config_round_trip_and_refusals():
    shape = interop.infer_shape(small_mae().state_dict(), num_heads=3, decoder_num_heads=4)
    for size in (32, (16, 64)):
        config = json.loads(json.dumps(interop.huggingface_config(shape | {"img_size": size}, norm_pix_loss=True)))
        assert config["norm_pix_loss"] is True
        assert interop.shape_from_huggingface_config(config) == shape | {"img_size": size}
    base = interop.shape_from_huggingface_config({"model_type": "vit_mae"})
    with torch.device("meta"):
        wanted = create_mae()
    assert base == {key: getattr(wanted, key) for key in base}
    narrow = {"model_type": "vit_mae", "hidden_size": 192, "intermediate_size": 576}  # of an encoder without a decoder
    assert interop.shape_from_huggingface_config(narrow)["mlp_ratio"] == 3
    with pytest.raises(ValueError, match=r"decoder_hidden_size must be 3\.0, got 4\.0"):
        interop.shape_from_huggingface_config(narrow | {"decoder_hidden_size": 512})
    with pytest.raises(ValueError, match="another target"):
        interop.huggingface_config(shape | {"target_dim": 108})
    for wrong, message in (
        ({"model_type": "vit"}, "only 'vit_mae'"),
        ({"hidden_act": "relu"}, "hidden_act must be gelu"),
        ({"decoder_intermediate_size": 1024}, "decoder_intermediate_size"),
        ({"patch_size": [16, 8]}, "patch_size must be 16"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.shape_from_huggingface_config({"model_type": "vit_mae"} | wrong)


@pytest.mark.parametrize("img_size", [32, (16, 64)])
def test_transformers_loads_our_export_and_computes_the_same(img_size, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_mae(img_size=img_size)
    shape = interop.infer_shape(model.state_dict(), num_heads=3, decoder_num_heads=4)
    checkpoint.write_export(model.state_dict(), shape, "huggingface", tmp_path, norm_pix_loss=True)
    theirs, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info

    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    patches = height * width // 64
    images, noise = torch.randn(2, 3, height, width), torch.rand(2, patches)
    with torch.no_grad():
        output = model(images, int(patches * 0.25), noise=noise)
        encoded = theirs.eval().vit(images, noise=noise)
        logits = theirs.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        predicted = logits.gather(1, output.predicted_ids.unsqueeze(-1).expand_as(output.pred))
        torch.testing.assert_close(predicted, output.pred, rtol=1e-5, atol=1e-5)
        if height == width:  # the loss of transformers is for square images only
            loss = reconstruction_loss(output.pred, pixel_target(images, 8, normalize=True), output.predicted_ids)
            torch.testing.assert_close(theirs(images, noise=noise).loss, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cause", [{"target_dim": 108}, {"img_size": (16, 24)}], ids=["hog", "six patches"])
def test_transformers_loads_the_encoder_of_a_decoder_it_cannot_build(cause, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_mae(**cause)
    shape = interop.infer_shape(model.state_dict(), num_heads=3, decoder_num_heads=4)
    with pytest.raises(ValueError, match="give --encoder_only"):
        checkpoint.write_export(model.state_dict(), shape, "huggingface", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()

    checkpoint.write_export(model.state_dict(), shape, "huggingface", tmp_path, encoder_only=True)
    theirs, info = transformers.ViTMAEModel.from_pretrained(tmp_path, mask_ratio=0.0, output_loading_info=True)
    assert not any(info.values()), info
    images = torch.randn(2, 3, *(cause.get("img_size") or (32, 32)))
    noise = torch.linspace(0, 1, model.num_patches).expand(2, -1)  # patches in their order
    with torch.no_grad():
        features = theirs.eval()(images, noise=noise).last_hidden_state
        torch.testing.assert_close(features, model.encode(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("img_size", [224, (64, 96)])
def test_timm_loads_our_export_and_computes_the_same(img_size, tmp_path):
    model = create_mae("mae_vit_tiny_patch16", img_size=img_size, decoder_embed_dim=32, decoder_depth=1)
    shape = interop.infer_shape(model.state_dict())
    checkpoint.write_export(model.state_dict(), shape, "timm", tmp_path / "encoder.safetensors")
    theirs = timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "encoder.safetensors"), img_size=img_size, num_classes=0
    ).eval()
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    images = torch.randn(1, 3, height, width)
    with torch.no_grad():
        features = model.eval().encode(images)
        torch.testing.assert_close(theirs.forward_features(images), features, rtol=1e-5, atol=1e-5)
    assert features.shape[1] == 1 + math.prod((height // 16, width // 16))

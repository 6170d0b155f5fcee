"""The cross-attention decoder: what its queries see, what it costs, and where its weights may go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mae_et import checkpoint, interop
from mae_et.model import CrossAttention, CrossBlock, MaskedAutoencoder, create_mae
from mae_et.plan.cost import flops_per_image
from mae_et.plan.curriculum import Stage

SHAPE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 1,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 16,
}


def model(decoder: str) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(**SHAPE, decoder=decoder)


@pytest.mark.parametrize(("decoder", "alone"), [("cross", True), ("self", False)])
def test_a_prediction_does_not_depend_on_what_else_is_predicted(decoder, alone):
    """With queries that see the visible patches only, fewer of them give the same predictions."""
    mae, images, noise = model(decoder), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        few, many = mae(images, 4, 3, noise), mae(images, 4, 12, noise)
    assert torch.equal(few.predicted_ids, many.predicted_ids[:, :3])
    assert torch.allclose(few.pred, many.pred[:, :3], atol=1e-6) == alone


def test_it_reads_the_visible_patches_and_where_it_is():
    mae, images, noise = model("cross"), torch.randn(1, 3, 32, 32), torch.arange(16.0)[None]
    with torch.no_grad():
        before = mae(images, 4, None, noise).pred
        assert (before[0, 0] - before[0, 1]).abs().max() > 1e-4  # two queries differ by their positions alone
        other = images.clone()
        other[..., 8:, :] = 0  # hidden rows of the grid
        assert torch.equal(mae(other, 4, None, noise).pred, before)
        other[..., :8, :8] += 1  # a visible patch
        assert not torch.allclose(mae(other, 4, None, noise).pred, before, atol=1e-4)


def test_attention_is_what_pytorchs_own_is():
    torch.manual_seed(0)
    attention, queries, context = CrossAttention(32, 4), torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([attention.q.weight, attention.kv.weight]),
            "in_proj_bias": torch.cat([attention.q.bias, attention.kv.bias]),
            "out_proj.weight": attention.proj.weight,
            "out_proj.bias": attention.proj.bias,
        }
    )
    expected, _ = theirs(queries, context, context)
    for attention.fused in (True, False):
        torch.testing.assert_close(attention(queries, context), expected)


def test_a_block_without_attention_and_mlp_passes_queries_through():
    block = CrossBlock(16, 2, 4.0)
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    queries = torch.randn(1, 3, 16)
    assert torch.equal(block(queries, torch.randn(1, 4, 16)), queries)


def test_all_of_it_learns_and_it_is_cheaper():
    mae = model("cross")
    mae(torch.randn(2, 3, 32, 32), 4).pred.square().mean().backward()
    silent = [name for name, p in mae.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent
    stage = Stage(224, 49, 147, 1)
    with torch.device("meta"):
        own, cross = (create_mae("mae_vit_base_patch16", decoder=decoder) for decoder in ("self", "cross"))
    assert flops_per_image(cross, stage) < 0.85 * flops_per_image(own, stage)


def test_compiles_without_a_break():
    mae, images, noise = model("cross"), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    compiled = torch.compile(mae, dynamic=False, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, 4, None, noise).pred, mae(images, 4, None, noise).pred)


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="unknown decoder 'crossed'; choose from self, cross"):
        model("crossed")


def test_weights_and_shape_come_back(tmp_path: Path):
    mae = model("cross")
    shape = SHAPE | {"decoder": "cross", "in_chans": 3, "target_dim": 192}
    own = {"format": checkpoint.FORMAT, "model": mae.state_dict(), "target": "pixel", "norm_pix_loss": False}
    checkpoint.save(own | {"shape": shape}, tmp_path / "checkpoint.pt")
    found = checkpoint.read_pretrained(tmp_path)
    assert found.has_decoder and found.shape["decoder"] == "cross"
    again = MaskedAutoencoder(**found.shape)
    again.load_state_dict(found.state)
    images, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    assert torch.equal(again(images, 4, None, noise).pred, mae(images, 4, None, noise).pred)
    assert interop.infer_shape(mae.state_dict())["decoder"] == "cross"
    assert "decoder" not in interop.infer_shape(model("self").state_dict())


@pytest.mark.parametrize("format", checkpoint.EXPORT_FORMATS)
def test_others_get_the_encoder_only(format: str, tmp_path: Path):
    state, out = model("cross").state_dict(), tmp_path / "out" / ("x.pth" if format == "facebook" else "x.safetensors")
    shape = SHAPE | {"decoder": "cross"}
    if format != "timm":
        with pytest.raises(ValueError, match=r"cross-attention decoder.*--encoder_only") as error:
            checkpoint.write_export(state, shape, format, out)
        assert "\n" not in str(error.value)
        assert not out.parent.exists()
    checkpoint.write_export(state, shape, format, out, encoder_only=True)
    found = checkpoint.read_pretrained(out)
    for key, tensor in interop.encoder_only(state).items():
        assert torch.equal(found.state[key], tensor)
    if format == "huggingface":
        assert not any("decoder" in key for key in json.loads((out / "config.json").read_text()))

"""What the other tests of the model (parity, cost, pictures) do not say: positions, masking, errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch

from mae_et import create_mae
from mae_et.model import sincos_table
from mae_et.plan.shapes import MODELS

SHAPE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SHAPE |= {f"decoder_{name}": value for name, value in {"embed_dim": 16, "depth": 1, "num_heads": 2}.items()}


def build(**shape):
    torch.manual_seed(0)
    return create_mae(img_size=32, patch_size=8, **(SHAPE | shape)).eval()


def test_position_table_is_maes_on_the_full_grid_and_keeps_places_on_others() -> None:
    """Against MAE's formula written out for single patches (arXiv 2111.06377: x half first, then y)."""
    table = sincos_table(32, (3, 5), (3, 5)).view(3, 5, 32)
    for y, x, i in ((0, 0, 0), (2, 4, 3), (1, 3, 7)):
        omega = 1 / 10000 ** (i / 8)
        expected = [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
        torch.testing.assert_close(table[y, x, [i, 8 + i, 16 + i, 24 + i]], torch.tensor(expected))
    # The centre of the one patch of a 1×1 grid lies in the middle of a 3×3 grid.
    torch.testing.assert_close(sincos_table(32, (1, 1), (3, 3))[0], sincos_table(32, (3, 3), (3, 3))[4])


def test_learned_positions_are_used_and_interpolated() -> None:
    """Foreign weights may bring any table; timm's own model is the reference, at its size and at another."""
    model = build()
    images = torch.randn(2, 3, 32, 32)
    model.encode(torch.randn(1, 3, 16, 16))  # fills the cache, which loading must empty
    state = model.state_dict()
    state["encoder.pos_embed"] = torch.randn_like(state["encoder.pos_embed"])
    model.load_state_dict(state)
    torch.testing.assert_close(model.encode(images), model.encoder.forward_features(images), rtol=1e-4, atol=1e-5)
    other = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=0, embed_dim=32, depth=2, num_heads=2
    ).eval()
    table = timm.layers.resample_abs_pos_embed(state["encoder.pos_embed"], [2, 2], [4, 4], num_prefix_tokens=1)
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    other.load_state_dict(encoder | {"pos_embed": table})
    small = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.encode(small), other.forward_features(small), rtol=1e-4, atol=1e-5)


def test_masked_pixels_never_reach_the_prediction() -> None:
    model, images, noise = build(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    output = model(images, 4, 6, noise)
    hidden = output.mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = model(torch.where(hidden == 1, torch.randn_like(images), images), 4, 6, noise)
    assert torch.equal(output.pred, changed.pred)
    assert output.pred.shape == (2, 6, 192)
    assert output.mask.sum(1).tolist() == [12, 12]
    assert torch.all(output.mask.gather(1, output.predicted_ids) == 1)
    visible = model(torch.where(hidden == 0, torch.randn_like(images), images), 4, 6, noise)
    assert not torch.allclose(output.pred, visible.pred)


def test_partial_prediction_predicts_the_next_lowest_noise() -> None:
    model, noise = build(), torch.tensor([[0.9, 0.1, 0.5, 0.2, 0.3, *[0.95] * 11]])
    output = model(torch.randn(1, 3, 32, 32), 2, 2, noise)
    assert output.mask[0].nonzero().flatten().tolist() == [0, 2, *range(4, 16)]
    assert output.predicted_ids.tolist() == [[4, 2]]


@pytest.mark.parametrize("name", MODELS)
def test_sizes_build_and_match_timms_names(name: str) -> None:
    with torch.device("meta"):
        model, reference = create_mae(name), timm.create_model(name.removeprefix("mae_") + "_224", num_classes=0)
    assert model.num_patches == reference.patch_embed.num_patches
    ours = {key: value.shape for key, value in model.encoder.state_dict().items()}
    assert ours == {key: value.shape for key, value in reference.state_dict().items()}


def test_initialisation() -> None:
    """MAE, Appendix A.1: xavier-uniform linears, the patch embedding as one of them, tokens N(0, 0.02), biases zero."""
    model = create_mae("mae_vit_small_patch16", depth=1, decoder_depth=1)
    projection = model.encoder.patch_embed.proj.weight.flatten(1)
    bound = math.sqrt(6 / sum(projection.shape))
    assert 0.95 * bound < projection.abs().max() <= bound
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("bias"))
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.encoder.pos_embed.requires_grad


def test_errors_name_the_numbers() -> None:
    model = build()
    with pytest.raises(ValueError, match="30×32 px is not divisible by the patch"):
        model.encode(torch.randn(1, 3, 30, 32))
    for visible, predicted in ((0, None), (16, None), (4, 13), (4, 0)):
        with pytest.raises(ValueError, match="grid of 16"):
            model(torch.randn(1, 3, 32, 32), visible, predicted)
    with pytest.raises(ValueError, match="mae_vit_base_patch16"):
        create_mae("mae_vit_bas_patch16")
    with pytest.raises(ValueError, match="decoder_embed_dim 18"):
        create_mae(decoder_embed_dim=18)


def test_own_positions_number_small_grids_from_zero():
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16}
    own = create_mae("mae_vit_tiny_patch16", **kwargs, decoder_depth=1, decoder_num_heads=2, own_positions=True)
    encoder, decoder = own.positions((2, 2))
    assert torch.equal(encoder[0, 1:], sincos_table(24, (2, 2), (2, 2)))
    assert torch.equal(decoder[0], sincos_table(16, (2, 2), (2, 2)))
    assert not torch.equal(encoder[0, 1:], sincos_table(24, (2, 2), (4, 4)))
    assert torch.equal(own.positions((4, 4))[0], own.encoder.pos_embed)


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_what_blocks_add_to_stays_float32_under_autocast(decoder: str) -> None:
    mae = build(decoder=decoder)
    seen = []
    for block in mae.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.extend(x.dtype for x in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        mae(torch.randn(2, 3, 32, 32), 4)
    assert len(seen) >= len(mae.blocks) and set(seen) == {torch.float32}


def test_runs_in_bfloat16_as_a_whole() -> None:
    mae = build().bfloat16()
    assert mae(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16), 4).pred.dtype == torch.bfloat16


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_the_residual_stream_may_be_bf16(decoder: str) -> None:
    """It is, in every block, and predictions and gradients stay close to those of a float32 stream."""
    torch.manual_seed(0)
    model = create_mae(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=3,
        num_heads=4,
        decoder_embed_dim=32,
        decoder_depth=2,
        decoder_num_heads=2,
        decoder=decoder,
    )
    images, noise, streams = torch.randn(4, 3, 32, 32), torch.rand(4, 16), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: streams.extend(t.dtype for t in (*inputs, output)))

    def step(dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
        model.residual_dtype = dtype
        streams.clear()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            pred = model(images, 4, None, noise).pred
        (pred.float() - 1).square().mean().backward()
        assert pred.shape == (4, 12, 192) and pred.dtype == torch.bfloat16 and pred.isfinite().all()
        assert set(streams) == {dtype or torch.float32}
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert {g.dtype for g in gradients} == {torch.float32}
        return pred.float(), torch.cat([g.flatten() for g in gradients])

    (pred, gradient), (pred_16, gradient_16) = step(None), step(torch.bfloat16)
    for exact, rounded in ((pred, pred_16), (gradient, gradient_16)):
        assert 0 < (exact - rounded).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("back", [True, False])
def test_a_table_rounded_to_half_precision_is_still_maes(dtype: torch.dtype, back: bool) -> None:
    """Else small grids would have it interpolated, off by a tenth and more."""
    model = build().to(dtype)
    model = model.float() if back else model
    table = model.positions((2, 2))[0]
    torch.testing.assert_close(table[0, 1:].float(), sincos_table(32, (2, 2), (4, 4)), atol=4e-3, rtol=0)


def test_a_model_may_be_cast_between_two_uses() -> None:
    small = torch.randn(2, 3, 16, 16)
    model = build()
    model(small, 1)
    assert model.bfloat16()(small.bfloat16(), 1).pred.dtype == torch.bfloat16


def test_a_model_that_was_used_under_inference_mode_can_be_trained() -> None:
    small, model = torch.randn(2, 3, 16, 16), build()
    with torch.inference_mode():
        model(small, 1)
        model.encode(small)
    model(small.requires_grad_(), 1).pred.sum().backward()
    assert small.grad.abs().sum() > 0


def test_a_model_can_be_pickled(tmp_path: Path) -> None:
    model = build()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.encode(images), model.encode(images))
    again.encode(images[..., :16, :16])
    again.load_state_dict(model.state_dict())
    assert not again._tables

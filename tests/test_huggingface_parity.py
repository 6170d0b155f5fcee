"""Our loss and gradients equal those of an independent MAE, transformers' ViTMAE, through our own converters.

Gradients are compared tensor by tensor: max |ours - theirs| / max |theirs|, where theirs are brought into our layout by
the same converter as the weights. The position tables are written here from the formula, since transformers 5 builds a
model with zeros in their place.
"""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from mae_et import interop
from mae_et.model import MaskedAutoencoder
from mae_et.targets import pixel_target, reconstruction_loss

transformers = pytest.importorskip("transformers")

PATCH = 8
TOLERANCE = 1e-5


def table(width: int, rows: int, columns: int) -> torch.Tensor:
    """MAE's table with a class token, [1, 1+L, width], from its definition: sin and cos of x, then of y."""
    omega = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (x, y)]
    patches = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), patches])).float()[None]


def reference(size_px: int | tuple[int, int], norm_pix_loss: bool = False, mask_ratio: float = 0.75):
    """A small ViTMAE in which no weight is at its initial value."""
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        image_size=size_px,
        patch_size=PATCH,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=384,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=256,
        layer_norm_eps=1e-6,
        norm_pix_loss=norm_pix_loss,
        mask_ratio=mask_ratio,
        attn_implementation="eager",
    )
    model = transformers.ViTMAEForPreTraining(config)
    rows, columns = (side // PATCH for side in ((size_px, size_px) if isinstance(size_px, int) else size_px))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.vit.embeddings.position_embeddings.copy_(table(96, rows, columns))
        model.decoder.decoder_pos_embed.copy_(table(64, rows, columns))
    return model


def ours_like(model, size_px: int | tuple[int, int]) -> MaskedAutoencoder:
    state = interop.from_huggingface(model.state_dict())
    shape = interop.infer_shape(state, num_heads=3, decoder_num_heads=4)
    assert shape["img_size"] == size_px
    ours = MaskedAutoencoder(**shape)
    ours.load_state_dict(state)  # strict
    return ours


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def batch(size_px: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, height, width, generator=generator)
    return images, torch.rand(4, height * width // PATCH**2, generator=generator)


@pytest.mark.parametrize("norm_pix_loss", [False, True], ids=["pixels", "normalised"])
@pytest.mark.parametrize("size_px", [32, 48, 64])
def test_loss_and_gradients_equal_the_reference(size_px, norm_pix_loss):
    theirs = reference(size_px, norm_pix_loss)
    ours = ours_like(theirs, size_px)
    images, noise = batch(size_px)
    visible = int(noise.shape[1] * (1 - theirs.config.mask_ratio))

    expected = theirs(images, noise=noise)
    expected.loss.backward()
    output = ours(images, visible, noise=noise)
    loss = reconstruction_loss(output.pred, pixel_target(images, PATCH, norm_pix_loss), output.predicted_ids)
    loss.backward()

    assert torch.equal(output.mask, expected.mask)
    loss_difference = abs(loss.item() - expected.loss.item()) / expected.loss.item()
    assert loss_difference <= TOLERANCE

    # Gradients of the fixed tables don't exist; the converter wants the keys.
    fixed = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    gradients = {n: p.detach() if n in fixed else p.grad for n, p in theirs.named_parameters()}
    wanted = interop.from_huggingface(gradients)
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert set(found) == set(wanted) - {"encoder.pos_embed"}
    for name in found:
        assert wanted[name].abs().max() > 1e-4, f"{name}: nothing to compare"
    differences = {name: difference(gradient, wanted[name]) for name, gradient in found.items()}
    worst = max(differences, key=differences.get)
    print(f"grid {size_px // PATCH}: loss {loss_difference:.1e}, gradients {differences[worst]:.1e} ({worst})")
    assert differences[worst] <= TOLERANCE, worst


@pytest.mark.parametrize("mask_ratio", [0.5, 0.9])
def test_predictions_equal_the_reference_at_other_mask_ratios(mask_ratio):
    theirs = reference(48, mask_ratio=mask_ratio).eval()
    images, noise = batch(48)
    with torch.no_grad():
        expected = theirs(images, noise=noise)
        output = ours_like(theirs, 48)(images, int(36 * (1 - mask_ratio)), noise=noise)
    ids = output.predicted_ids.unsqueeze(-1).expand_as(output.pred)
    assert torch.equal(output.mask, expected.mask)
    assert difference(output.pred, expected.logits.gather(1, ids)) <= TOLERANCE


def test_non_square_predictions_equal_the_reference():
    # transformers cuts only square images into patches, so its loss can't be had; its encoder and decoder can.
    size_px = (16, 64)
    theirs = reference(size_px).eval()
    images, noise = batch(size_px)
    with torch.no_grad():
        encoded = theirs.vit(images, noise=noise)
        expected = theirs.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        output = ours_like(theirs, size_px)(images, 4, noise=noise)
    ids = output.predicted_ids.unsqueeze(-1).expand_as(output.pred)
    assert torch.equal(output.mask, encoded.mask)
    assert difference(output.pred, expected.gather(1, ids)) <= TOLERANCE


@pytest.mark.parametrize("size_px", [32, (16, 64)])
def test_features_equal_transformers_and_timm(size_px):
    theirs = reference(size_px, mask_ratio=0.0).eval()
    ours = ours_like(theirs, size_px)
    images, noise = batch(size_px)
    plain = timm.models.VisionTransformer(
        img_size=size_px, patch_size=PATCH, embed_dim=96, depth=3, num_heads=3, num_classes=0
    ).eval()
    plain.load_state_dict(interop.to_timm(ours.state_dict()))
    with torch.no_grad():
        features = ours.encode(images)
        encoded = theirs.vit(images, noise=noise)
        from_timm = plain.forward_features(images)
    # Masking nothing still shuffles the patches.
    order = encoded.ids_restore.unsqueeze(-1).expand(-1, -1, 96)
    patches = encoded.last_hidden_state[:, 1:].gather(1, order)
    assert difference(features[:, :1], encoded.last_hidden_state[:, :1]) <= TOLERANCE
    assert difference(features[:, 1:], patches) <= TOLERANCE
    assert difference(features, from_timm) <= TOLERANCE

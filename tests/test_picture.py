"""The picture shows what the model knows and nothing else; `reconstruct` draws it from a run folder or a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from mae_et import checkpoint, interop
from mae_et.data.sources import open_source
from mae_et.engine import picture, storage
from mae_et.engine.picture import draw_reconstruction, hog_strokes, predicted_pixels
from mae_et.engine.resume import FORMAT
from mae_et.evaluate.config import ReconstructConfig
from mae_et.evaluate.reconstruct import reconstruct
from mae_et.model import MaskedAutoencoder, Output
from mae_et.plan.curriculum import Stage
from mae_et.plan.shapes import target_dim
from mae_et.targets import hog_target, pixel_target

PATCH = 4
SHAPE = {"patch_size": PATCH, "embed_dim": 16, "depth": 1, "num_heads": 2}
SHAPE |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
GREY_STATISTICS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def tiny_model(img_size=(24, 16), in_chans=3, target="pixel", **shape) -> MaskedAutoencoder:
    shape = SHAPE | shape
    values = target_dim(target, shape["patch_size"], in_chans)
    return MaskedAutoencoder(img_size=img_size, in_chans=in_chans, target_dim=values, **shape)


def perfect_output(images, patch_px, num_visible, num_predicted, noise, target="pixel", normalized=False) -> Output:
    """What a model that knows the hidden patches would return."""
    wanted = hog_target(images, patch_px) if target == "hog" else pixel_target(images, patch_px, normalized)
    order = noise.argsort(1)
    ids = order[:, num_visible : num_visible + num_predicted]
    mask = torch.ones_like(noise).scatter_(1, order[:, :num_visible], 0)
    return Output(wanted.gather(1, ids.unsqueeze(-1).expand(-1, -1, wanted.shape[-1])), ids, mask)


def perfect_model(img_size, target="pixel", normalized=False, **shape) -> MaskedAutoencoder:
    model = tiny_model(img_size, target=target, **shape)

    def forward(self, images, num_visible, num_predicted, noise):
        return perfect_output(images, self.patch_size, num_visible, num_predicted, noise, target, normalized)

    model.forward = types.MethodType(forward, model)
    return model


def pixels_where(output: Output, grid, kind) -> torch.Tensor:
    """[B, 1, h, w], true in the patches that are "predicted" or "hidden"."""
    chosen = output.mask.bool()
    if kind == "predicted":
        chosen = torch.zeros_like(chosen).scatter_(1, output.predicted_ids, True)
    return rearrange(chosen, "b (h w) -> b 1 h w", h=grid[0]).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def random_images(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def blocks(monkeypatch) -> list:
    """What draw_reconstruction lays out: (caption, rows of panels) per stage."""
    seen = []
    lay_out = picture._sheet

    def spy(title, heads, given, side_px):
        seen[:] = given
        return lay_out(title, heads, given, side_px)

    monkeypatch.setattr(picture, "_sheet", spy)
    return seen


# ------------------------------------------------------------------------------------------------- un-normalisation


def test_a_perfect_prediction_with_true_statistics_gives_back_the_input():
    images = random_images(2, 3, 24, 16) * 3 + 1
    output = perfect_output(images, PATCH, 6, 12, torch.rand(2, 24), normalized=True)
    drawn = predicted_pixels(images, output, PATCH, normalized=True, statistics="true")
    predicted = pixels_where(output, (6, 4), "predicted")
    torch.testing.assert_close(drawn, images * predicted)


def test_plain_pixels_are_drawn_as_predicted():
    images = random_images(2, 3, 24, 16)
    output = perfect_output(images, PATCH, 6, 18, torch.rand(2, 24))
    drawn = predicted_pixels(images, output, PATCH, normalized=False)
    assert torch.equal(drawn, images * pixels_where(output, (6, 4), "predicted"))


def test_by_default_hidden_pixels_have_no_influence_on_what_is_drawn():
    images = random_images(2, 3, 24, 16)
    output = perfect_output(images, PATCH, 6, 12, torch.rand(2, 24), normalized=True)
    hidden = pixels_where(output, (6, 4), "hidden")
    others = torch.where(hidden, 5 - 7 * images, images)

    def panels(x, statistics):
        rows = picture._panels(x, output, PATCH, "pixel", True, statistics, **GREY_STATISTICS)
        return [[np.asarray(panel) for panel in row[1:]] for row in rows]  # without the input itself

    np.testing.assert_array_equal(panels(images, "visible"), panels(others, "visible"))
    assert not np.array_equal(panels(images, "true"), panels(others, "true"))


def test_guessed_statistics_come_from_near_visible_patches():
    ramp = torch.arange(4.0).repeat_interleave(PATCH).expand(1, 1, PATCH, 16)  # patches of 0, 1, 2, 3 in one row
    output = Output(torch.zeros(1, 2, PATCH**2), torch.tensor([[1, 2]]), torch.tensor([[0.0, 1, 1, 0]]))
    drawn = predicted_pixels(ramp, output, PATCH, normalized=True)[0, 0, 0, ::PATCH]
    # 1/distance²: patch 1 is 1 from the patch of 0 and 2 from the patch of 3.
    torch.testing.assert_close(drawn, torch.tensor([0.0, 3 * 0.2, 3 * 0.8, 0.0]))


def test_guessed_spread_is_that_of_the_visible_patches():
    images = random_images(1, 1, PATCH, 8)
    output = Output(torch.ones(1, 1, PATCH**2), torch.tensor([[1]]), torch.tensor([[0.0, 1]]))
    visible = images[..., :PATCH]
    drawn = predicted_pixels(images, output, PATCH, normalized=True)[..., PATCH:]
    torch.testing.assert_close(drawn, (visible.mean() + (visible.var() + 1e-6).sqrt()).expand_as(drawn))


# ------------------------------------------------------------------------------------------------------ HOG strokes


@pytest.mark.parametrize("degrees", [10, 30, 50, 70, 90, 110, 130, 150, 170])
def test_strokes_run_along_the_edge(degrees):
    """An edge that rises to the right (y upwards) at `degrees` gives strokes at that angle, to half a bin."""
    angle, side = math.radians(degrees), 32
    y, x = torch.meshgrid(*2 * [torch.arange(side) - side / 2 + 0.5], indexing="ij")
    across = x * math.sin(angle) + y * math.cos(angle)  # y points down
    image = (across / 2).sigmoid().expand(1, 1, side, side)
    drawn = hog_strokes(hog_target(image, 16), (2, 2), cell_px=21)[0]
    # Of the four cells around the centre, the edge passes through all or the opposite two: take the brightest.
    cells = rearrange(drawn, "(h y) (w x) -> (h w) y x", y=21, x=21)
    cell = cells[cells.sum((1, 2)).argmax()]
    v, u = torch.meshgrid(*2 * [torch.arange(21.0) - 10], indexing="ij")
    v = -v
    moment = 0.5 * torch.atan2(2 * (cell * u * v).sum(), (cell * (u**2 - v**2)).sum())
    difference = (math.degrees(moment) - degrees + 90) % 180 - 90
    assert abs(difference) <= 11


def test_strokes_are_as_bright_as_the_histogram_and_keep_their_place():
    hog = torch.zeros(1, 4, 36)
    hog[0, 1, 4 * 4 + 2] = 1.0  # patch at row 0, column 1; bin 4; cell row 1, cell column 0
    hog[0, 2, 4 * 4 + 0] = 0.25
    cells = rearrange(hog_strokes(hog, (2, 2), 9)[0], "(h y) (w x) -> h w y x", y=9, x=9).amax((2, 3))
    assert cells[1, 2] == 1
    assert 0 < cells[2, 0] < 1
    assert (cells > 0).sum() == 2


@pytest.mark.parametrize("orientation", range(9))
def test_a_stroke_is_as_long_as_its_magnitude_says(orientation):
    hog = torch.zeros(2, 1, 36)
    hog[0, 0, 4 * orientation], hog[1, 0, 4 * orientation] = 1.0, 0.5
    lit = (hog_strokes(hog, (1, 1), 41)[:, :41, :41] > 0.3).float()
    place = torch.arange(41.0) - 20
    full, half = (2 * (torch.hypot(*torch.meshgrid(place, place, indexing="ij")) * stroke).max() for stroke in lit)
    assert 38 <= full <= 44
    assert 18 <= half <= 24


# ----------------------------------------------------------------------------------------------------- the PNG file


@pytest.mark.parametrize("target", ["pixel", "hog"])
def test_six_photographs_at_224_px_stay_below_the_file_size(tmp_path, monkeypatch, target):
    source = open_source("photos")
    tiles = [Image.fromarray(np.asarray(source.read(i * 192)[0])).convert("RGB").resize((224, 224)) for i in range(6)]
    images = torch.stack([torch.from_numpy(np.array(tile)).movedim(-1, 0) for tile in tiles]) / 63.75 - 2
    stages = [Stage(96, 9, 27, 1), Stage(224, 49, 147, 1)] if target == "pixel" else [Stage(224, 49, 147, 1)]
    path = tmp_path / "new" / "folder" / "picture.png"
    model = perfect_model(224, target, patch_size=16)
    draw_reconstruction(model, images, stages, target=target, normalized=False, path=path, **GREY_STATISTICS)
    size, side = path.stat().st_size, Image.open(path).width
    assert size <= picture.MAX_BYTES == 300_000
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    with Image.open(path) as drawn:
        assert drawn.format == "PNG"
        assert min(drawn.size) > 500

    monkeypatch.setattr(picture, "MAX_BYTES", size // 2)
    draw_reconstruction(model, images, stages, target=target, normalized=False, path=path, **GREY_STATISTICS)
    assert path.stat().st_size <= size // 2
    assert Image.open(path).width < side


def test_every_stage_and_image_appears_with_its_counts(tmp_path, blocks):
    stages = [Stage((12, 8), 2, 4, 1), Stage((24, 16), 6, 11, 1)]
    draw = dict(target="pixel", normalized=False, **GREY_STATISTICS)
    draw_reconstruction(
        tiny_model(), random_images(5, 3, 24, 16), stages, path=tmp_path / "a.png", max_images=3, **draw
    )
    captions = [caption for caption, _ in blocks]
    assert captions[0].startswith("12×8 px  ·  2 of 6 patches visible, 4 predicted  ·")
    assert captions[1].startswith("24×16 px  ·  6 of 24 patches visible, 11 predicted, 7 neither (striped)  ·")
    for (_, rows), (height, width) in zip(blocks, [(12, 8), (24, 16)], strict=True):
        assert [[panel.size for panel in row] for row in rows] == [[(width, height)] * 4] * 3
    draw_reconstruction(tiny_model(), random_images(3, 3, 24, 16), stages[:1], path=tmp_path / "b.png", **draw)
    heights = [Image.open(tmp_path / name).height for name in ("a.png", "b.png")]
    assert heights[0] > 1.8 * heights[1]


def test_what_was_not_predicted_is_striped_and_what_was_is_not(tmp_path, blocks):
    images = torch.ones(1, 3, 8, 16)  # mean 0.5 and std 0.25: 0.75, neither grey nor stripe
    model = perfect_model((8, 16))
    stage = Stage((8, 16), 2, 3, 1)
    draw_reconstruction(
        model, images, [stage], target="pixel", normalized=False, path=tmp_path / "a.png", **GREY_STATISTICS
    )
    masked, prediction, pasted = (
        rearrange(np.asarray(panel)[..., 0], "(h p) (w q) -> (h w) (p q)", p=PATCH, q=PATCH)
        for panel in blocks[0][1][0][1:]
    )
    assert ((masked == 191).all(1)).sum() == 2  # visible; the other six are grey
    assert ((prediction == 191).all(1)).sum() == 3
    assert ((pasted == 191).all(1)).sum() == 5
    striped = [len(np.unique(patch)) == 2 for patch in pasted]
    assert sum(striped) == 3
    assert striped == [len(np.unique(patch)) == 2 for patch in prediction]


def test_what_was_seen_is_pale_grey_beside_what_was_predicted(tmp_path, blocks):
    images = random_images(1, 3, 8, 16) / 4
    draw = dict(target="pixel", normalized=False, path=tmp_path / "a.png", **GREY_STATISTICS)
    draw_reconstruction(perfect_model((8, 16)), images, [Stage((8, 16), 3, 5, 1)], **draw)
    shown, masked, prediction, _ = (
        rearrange(np.asarray(panel) / 255, "(h p) (w q) c -> (h w) (p q) c", p=PATCH, q=PATCH)
        for panel in blocks[0][1][0]
    )
    seen = (masked == shown).all((1, 2))
    assert seen.sum() == 3
    np.testing.assert_array_equal(prediction[~seen], shown[~seen])  # by a perfect model
    grey = prediction[seen]
    assert (grey == grey[..., :1]).all() and grey.min() > 0.5 and grey.max() < 0.95
    brightness = shown[seen].mean(-1).ravel()
    assert np.corrcoef(brightness, grey[..., 0].ravel())[0, 1] > 0.99, "what was seen can still be recognised"


@pytest.mark.parametrize(("statistics", "says"), [("visible", "guessed from visible patches only"), ("true", "LEAK")])
def test_the_caption_says_where_patch_statistics_come_from(tmp_path, blocks, statistics, says):
    draw_reconstruction(
        tiny_model(), random_images(1, 3, 24, 16), [Stage((24, 16), 6, 18, 1)], target="pixel", normalized=True,
        statistics=statistics, path=tmp_path / "a.png", **GREY_STATISTICS,
    )  # fmt: skip
    assert says in blocks[0][0]
    assert ("LEAK" in blocks[0][0]) == (statistics == "true")


@pytest.mark.parametrize(("channels", "says"), [(1, None), (2, "channel 1 of 2 shown"), (5, "channels 1–3 of 5 shown")])
def test_other_numbers_of_channels(tmp_path, blocks, channels, says):
    draw_reconstruction(
        tiny_model(in_chans=channels), random_images(1, channels, 24, 16), [Stage((24, 16), 6, 18, 1)], target="pixel",
        normalized=False, mean=(0.5,) * channels, std=(0.25,) * channels, path=tmp_path / "a.png",
    )  # fmt: skip
    assert says is None or says in blocks[0][0]
    assert ("shown" in blocks[0][0]) == (says is not None)
    shown = np.asarray(blocks[0][1][0][0])
    assert (shown[..., 0] == shown[..., 1]).all() == (channels < 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_restored_even_after_an_error(tmp_path, training):
    model = tiny_model().train(training)
    during = []
    model.decoder_norm.register_forward_hook(lambda module, *_: during.append(module.training))
    draw = dict(target="pixel", normalized=False, path=tmp_path / "a.png", **GREY_STATISTICS)
    draw_reconstruction(model, random_images(1, 3, 24, 16), [Stage((24, 16), 6, 18, 1)], **draw)
    assert during == [False]
    assert all(module.training == training for module in model.modules())
    with pytest.raises(ValueError, match="at most the image's 24×16"):
        draw_reconstruction(model, random_images(1, 3, 24, 16), [Stage((48, 16), 6, 18, 1)], **draw)
    assert all(module.training == training for module in model.modules())


def test_the_same_seed_draws_the_same_picture(tmp_path):
    draw = dict(target="pixel", normalized=False, **GREY_STATISTICS)
    model, images, stages = tiny_model(), random_images(2, 3, 24, 16), [Stage((24, 16), 6, 18, 1)]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_reconstruction(model, images, stages, path=tmp_path / name, seed=seed, **draw)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": "sift"}, "unknown target 'sift'; choose from pixel, hog"),
        ({"statistics": "none"}, "unknown statistics 'none'; choose from visible, true"),
        ({"mean": (0.5,)}, r"one value per channel \(3\), got 1 and 3"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, wrong, message):
    right = dict(target="pixel", normalized=False, path=tmp_path / "a.png", **GREY_STATISTICS)
    with pytest.raises(ValueError, match=message):
        draw_reconstruction(tiny_model(), random_images(1, 3, 24, 16), [Stage((24, 16), 6, 18, 1)], **right | wrong)


# ------------------------------------------------------------------------------------------------------ reconstruct


def write_run(folder, data_path="photos", target="pixel", norm_pix_loss=False, mean=0.5, holdout=0, **shape):
    """As much of a run folder as a picture needs."""
    folder.mkdir()
    torch.manual_seed(0)
    model = tiny_model(32, target=target, **shape)
    stages = [Stage(16, 4, 12, 8, steps=1), Stage(32, 16, 40, 8, steps=1)]
    state = {
        "format": FORMAT,
        "model": model.state_dict(),
        "shape": SHAPE | shape | {"img_size": 32, "in_chans": 3, "target_dim": model.target_dim},
        "target": target,
        "norm_pix_loss": norm_pix_loss,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "config": {"data_path": str(data_path), "holdout": holdout},
        "step": 2,
        "mean": [mean] * 3,
        "std": [0.25, 0.25, 0.25],
    }
    storage.save(state, folder / "checkpoint.pt")
    return folder


def write_images(folder, count=3):
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(("target", "norm_pix_loss", "says"), [("pixel", True, "guessed"), ("hog", False, "strokes")])
def test_a_run_folder_is_drawn_with_its_own_stages_and_images(tmp_path, blocks, target, norm_pix_loss, says):
    run = write_run(tmp_path / "run", target=target, norm_pix_loss=norm_pix_loss)
    assert reconstruct(ReconstructConfig(str(run), num_images=2)) == run / "reconstruction.png"
    assert [caption.split(" ")[0] for caption, _ in blocks] == ["16×16", "32×32"]
    assert "40 predicted, 8 neither" in blocks[1][0]
    assert says in blocks[1][0]
    assert [len(rows) for _, rows in blocks] == [2, 2]
    with Image.open(run / "reconstruction.png") as drawn:
        assert drawn.width > 400


def test_held_out_images_are_drawn_where_there_are_any(tmp_path, blocks):
    data = tmp_path / "data"
    write_images(data / "train", 3), write_images(data / "val", 1)
    run = write_run(tmp_path / "run", data)
    reconstruct(ReconstructConfig(str(run)))
    assert [len(rows) for _, rows in blocks] == [1, 1]
    flat = write_images(tmp_path / "flat", 2)
    out = tmp_path / "other.png"
    assert reconstruct(ReconstructConfig(str(run / "checkpoint.pt"), images=str(flat), out=str(out))) == out
    assert [len(rows) for _, rows in blocks] == [2, 2]
    assert out.is_file()


def test_training_images_that_the_run_held_out_are_drawn(tmp_path, blocks):
    run = write_run(tmp_path / "run", write_images(tmp_path / "flat", 5), holdout=2)
    reconstruct(ReconstructConfig(str(run)))
    assert [len(rows) for _, rows in blocks] == [2, 2]


def test_what_cannot_be_read_is_skipped(tmp_path, blocks, caplog):
    images = write_images(tmp_path / "images", 3)
    sorted(images.iterdir())[1].write_bytes(b"no picture")
    reconstruct(ReconstructConfig(str(write_run(tmp_path / "run")), images=str(images)))
    assert {len(rows) for _, rows in blocks} == {2}
    assert "skipped" in caplog.text and sorted(images.iterdir())[1].name in caplog.text


def test_the_input_is_drawn_in_its_own_colours(tmp_path, blocks):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 40), (200, 100, 50)).save(images / "one.png")
    reconstruct(ReconstructConfig(str(write_run(tmp_path / "run")), images=str(images)))
    for _, rows in blocks:
        assert np.abs(np.asarray(rows[0][0], dtype=int) - (200, 100, 50)).max() <= 1


def test_the_model_is_fed_with_the_mean_of_its_run(tmp_path, blocks):
    def prediction(name, mean):
        reconstruct(ReconstructConfig(str(write_run(tmp_path / name, mean=mean)), num_images=1))
        return np.asarray(blocks[1][1][0][2])

    assert np.array_equal(prediction("a", 0.5), prediction("b", 0.5))
    assert not np.array_equal(prediction("c", 0.5), prediction("d", 0.1))


def test_a_foreign_checkpoint_is_drawn_at_the_sizes_of_et_pp(tmp_path, blocks):
    # Foreign files don't say how many heads there are: widths from which that can be told.
    run = write_run(tmp_path / "run", embed_dim=64, num_heads=1, decoder_num_heads=16)
    pretrained = checkpoint.read_pretrained(run)
    foreign = tmp_path / "foreign.pth"
    checkpoint.write_export(pretrained, pretrained.shape, "facebook", foreign)
    images = write_images(tmp_path / "images")
    picture_file = reconstruct(ReconstructConfig(str(foreign), images=str(images)))
    assert picture_file == tmp_path / "reconstruction.png"
    assert [caption.split("  ·  ")[0] for caption, _ in blocks] == ["16×16 px", "24×24 px", "32×32 px"]
    assert "16 of 64 patches visible, 48 predicted" in blocks[2][0]
    assert "as predicted" in blocks[2][0]
    reconstruct(ReconstructConfig(str(foreign), images=str(images), norm_pix_loss=True, true_statistics=True))
    assert "LEAK" in blocks[2][0]
    with pytest.raises(ValueError, match="--images is needed"):
        reconstruct(ReconstructConfig(str(foreign)))


def test_heads_that_a_file_does_not_say_are_given(tmp_path):
    pretrained = checkpoint.read_pretrained(
        write_run(tmp_path / "run", embed_dim=32, num_heads=2, decoder_num_heads=16)
    )
    torch.save({"model": interop.to_facebook(pretrained.state, 32)}, tmp_path / "foreign.pth")
    config = ReconstructConfig(str(tmp_path / "foreign.pth"), images=str(write_images(tmp_path / "images")))
    with pytest.raises(ValueError, match=r"num_heads of width 32 can't be told from weights: pass .*--num_heads"):
        reconstruct(config)
    assert reconstruct(dataclasses.replace(config, num_heads=2)).is_file()


def test_a_folder_by_its_address_is_drawn_here(tmp_path, monkeypatch):
    pretrained = checkpoint.read_pretrained(write_run(tmp_path / "run", tmp_path / "gone"))
    checkpoint.write_export(pretrained, pretrained.shape, "timm", tmp_path / "exported")
    images = write_images(tmp_path / "images")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    reconstruct(ReconstructConfig(f"local-dir:{tmp_path}/exported", images=str(images)))
    assert (tmp_path / "here/reconstruction.png").exists() and not (tmp_path / "exported/reconstruction.png").exists()


def test_bad_input_is_named_in_one_line(tmp_path):
    run = write_run(tmp_path / "run", tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"no picture")
    encoder = tmp_path / "encoder.safetensors"
    pretrained = checkpoint.read_pretrained(run)
    checkpoint.write_export(pretrained, pretrained.shape, "timm", encoder)
    hog = write_run(tmp_path / "hog", target="hog")
    for config, message in (
        ({"run": str(tmp_path / "no_run")}, "no_run: no such file or timm model"),
        ({"run": str(run)}, "--images .*gone does not exist"),
        ({"run": str(run), "images": str(tmp_path / "empty")}, "--images .*empty: no images"),
        ({"run": str(run), "images": str(tmp_path / "damaged")}, "--images: none of 1 images could be read, .*a.png"),
        ({"run": str(run), "true_statistics": True}, "--true_statistics: .* doesn't predict normalised pixels"),
        ({"run": str(run), "norm_pix_loss": True}, "--norm_pix_loss: .*run was trained on pixels as they are"),
        ({"run": str(hog), "norm_pix_loss": True}, "--norm_pix_loss: the decoder of .* predicts hog"),
        ({"run": str(encoder)}, "encoder.safetensors: has no decoder.*checkpoint.pt of a run folder has one"),
        ({"run": str(run), "num_images": 0}, "--num_images must be positive"),
        ({"run": str(run), "out": "picture.jpg"}, "--out must be a .png file, got picture.jpg"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            reconstruct(ReconstructConfig(**config))
        assert "\n" not in str(error.value)

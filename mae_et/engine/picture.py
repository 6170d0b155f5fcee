"""Reconstruction pictures that use no information about hidden patches.

B images · C channels · h×w a stage's size · p patch side · L patches · V visible · P predicted · T = p·p·C.

With per-patch normalised pixels (MAE, arXiv 2111.06377, Table 1d) the model predicts neither the mean nor the spread of
a patch. Taking both from the hidden pixels makes any prediction look good, so by default they are guessed from visible
patches, and the caption says which way it was done.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..files import write
from ..model import MaskedAutoencoder, Output
from ..plan.curriculum import Stage
from ..plan.shapes import HOG_BINS, TARGETS, choice, grid_of, num_patches, show_size
from ..spectral import low_frequency_input
from ..targets import hog_target, pixel_target

STATISTICS = {
    "visible": "patch mean and std guessed from visible patches only",
    "true": "LEAK: true mean and std of every hidden patch, shows more than the model knows",
}
HEADS = {
    "pixel": ("input", "masked input", "prediction", "pasted"),
    "hog": ("input", "masked input", "predicted HOG", "true HOG"),
}
MAX_BYTES = 300_000
#: (longer side of a panel in pixels, colours of the palette): the first pair whose file stays below MAX_BYTES is taken.
PANELS = ((192, 128), (160, 128), (160, 64), (144, 32), (96, 32), (64, 32))

#: Name of a text in the PNG that says where the panels of each block lie, for the strip of a run's progress.
PLACES = "panels"

VISIBLE, PREDICTED, NEITHER = 0, 1, 2  # kinds of patch
GREY, STRIPE = 0.55, 0.78  # what the model didn't see; stripes on it where nothing was predicted either
PALEST, CONTRAST = 0.93, 0.4  # greyed patches: their white, and how much darker their black is
SEEN_STROKES = 0.3  # grey in place of strokes where the model saw the patch
STROKE_CELL_PX = 9  # smallest cell in which a stroke's direction can be read
MARGIN, GAP, GROUP_GAP = 16, 4, 20
INK, FAINT, WARNING = "#1a1a1a", "#6b6b6b", "#b3261e"

Rows = list[list[Image.Image]]
Block = tuple[str, Rows]


def draw_reconstruction(
    model: MaskedAutoencoder,
    images: Tensor,
    stages: Sequence[Stage],
    *,
    target: str,
    path: str | Path,
    title: str = "",
    **options: Any,
) -> None:
    """Write a PNG with one block per stage: :func:`reconstruction_blocks`, drawn by :func:`write_sheet`."""
    write_sheet(path, title, target, reconstruction_blocks(model, images, stages, target=target, **options))


@torch.no_grad()
def reconstruction_blocks(
    model: MaskedAutoencoder,
    images: Tensor,
    stages: Sequence[Stage],
    *,
    target: str,
    normalized: bool,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    statistics: str = "visible",
    operator: str = "dct",
    max_images: int = 6,
) -> list[Block]:
    """Per stage a caption and, per image, input | masked input | prediction | pasted: all that needs the model.

    images: [B, C, H, W] at full size, normalised with mean and std ([C] each); the first `max_images` are drawn, each
    low-frequency cropped to the stage's size by `operator`. Pasted: visible patches of the input, the prediction
    elsewhere; patches that are neither are striped. With `target="hog"` the last two are predicted and true HOG, as
    strokes along edges.
    normalized: the target was per-patch normalised pixels; `statistics` says whose mean and std undo it: "visible"
    (guessed from the visible patches) or "true" (a leak, and labelled as one).
    seed: of the masks.

    The model is in eval mode meanwhile; its training flag is restored. Raises ValueError on an unknown target or
    statistics, or if mean and std don't have C values.
    """
    choice("target", target, TARGETS)
    choice("statistics", statistics, STATISTICS)
    channels = images.shape[1]
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean and std need one value per channel ({channels}), got {len(mean)} and {len(std)}")
    images = images[:max_images].to(model.mask_token.device).float()
    was_training = model.training
    model.eval()
    try:
        blocks = []
        for stage in stages:
            small = low_frequency_input(images, stage, operator)
            patches = num_patches(stage.size_px, model.patch_size)
            noise = torch.rand(len(small), patches, generator=torch.Generator().manual_seed(seed))
            output = model(small, stage.num_visible, stage.num_predicted, noise.to(small.device))
            rows = _panels(small, output, model.patch_size, target, normalized, statistics, mean, std)
            blocks.append((_caption(stage, patches, channels, target, normalized, statistics), rows))
        return blocks
    finally:
        model.train(was_training)


def write_sheet(path: str | Path, title: str, target: str, blocks: list[Block]) -> None:
    """Draw blocks below each other and write them as a PNG below MAX_BYTES, atomically; the path's folder is made."""
    write_smallest(path, lambda side_px: _sheet(title, HEADS[target], blocks, side_px))


def write_smallest(path: str | Path, draw: Callable[[int], Image.Image]) -> None:
    """Write the first PNG of PANELS below MAX_BYTES, atomically. draw: a picture whose panels have that longer side."""
    for side_px, colors in PANELS:
        png = _encode(draw(side_px), colors)
        if len(png) <= MAX_BYTES:
            break
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: file.write(png))


def predicted_pixels(
    images: Tensor, output: Output, patch_px: int, *, normalized: bool, statistics: str = "visible"
) -> Tensor:
    """A prediction as an image: [B, C, h, w], on the scale of `images`, 0 where nothing was predicted.

    images: [B, C, h, w], what the model was given. normalized, statistics: as in :func:`reconstruction_blocks`.
    """
    grid = grid_of(tuple(images.shape[-2:]), patch_px)
    patches = pixel_target(images, patch_px)  # [B, L, T]
    pred = output.pred.float()  # [B, P, T]
    if normalized:
        patch_mean, patch_std = _statistics(patches, output, grid, statistics)  # [B, P, 1] each
        pred = pred * patch_std + patch_mean
    placed = torch.zeros_like(patches).scatter_(1, output.predicted_ids.unsqueeze(-1).expand_as(pred), pred)
    return rearrange(placed, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch_px, q=patch_px)


def hog_strokes(hog: Tensor, grid: tuple[int, int], cell_px: int) -> Tensor:
    """HOG features as light strokes on black, [B, rows·2·cell_px, columns·2·cell_px], in [0, 1].

    hog: [B, L, C·9·4] as from :func:`hog_target`, L = rows·columns of `grid`. Per cell and orientation one stroke
    through the cell's centre, along the edge; the mean magnitude over the channels sets its length and brightness.
    """
    cells = rearrange(hog, "b (h w) (c o y x) -> b c (h y) (w x) o", h=grid[0], o=HOG_BINS, y=2, x=2)
    magnitude = cells.float().mean(1).clamp(0, 1)[..., None, None]  # [B, rows·2, columns·2, 9, 1, 1]
    # hog_target's angle is atan2(gx, gy), so the gradient points along (x, y) = (sin, cos) and the edge along
    # (cos, -sin), with y downwards as in images.
    angle = (torch.arange(HOG_BINS, device=hog.device) + 0.5)[:, None, None] * math.pi / HOG_BINS  # [9, 1, 1]
    place = torch.arange(cell_px, device=hog.device) - (cell_px - 1) / 2
    along = (place * angle.cos() - place[:, None] * angle.sin()).abs()  # [9, cell_px, cell_px]
    across = (place * angle.sin() + place[:, None] * angle.cos()).abs()
    stroke = (cell_px / 18 + 0.5 - across).clamp(0, 1) * (magnitude * cell_px / 2 - along + 0.5).clamp(0, 1)
    # The strongest stroke wins where several cross, so that a cell's centre isn't always white. The root keeps the
    # faint strokes of an undecided prediction legible.
    return rearrange((stroke * magnitude.sqrt()).amax(3), "b h w y x -> b (h y) (w x)")


def _statistics(patches: Tensor, output: Output, grid: tuple[int, int], whose: str) -> tuple[Tensor, Tensor]:
    """Mean and std of the predicted patches, [B, P, 1] each: true, or guessed from the visible patches.

    A guess is the mean over the visible patches, weighted by 1/distance² on the grid.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # [B, L, 1]
    std = (variance + 1e-6).sqrt()  # as in pixel_target
    if whose == "true":
        ids = output.predicted_ids.unsqueeze(-1)
        return mean.gather(1, ids), std.gather(1, ids)
    num_visible = int((output.mask[0] == 0).sum())
    visible_ids = output.mask.argsort(dim=1, stable=True)[:, :num_visible]  # [B, V]
    place = torch.cartesian_prod(*(torch.arange(float(side), device=patches.device) for side in grid))  # [L, 2]
    weights = torch.cdist(place[output.predicted_ids], place[visible_ids]).pow(-2)  # [B, P, V]
    weights = weights / weights.sum(-1, keepdim=True)
    ids = visible_ids.unsqueeze(-1)
    with torch.autocast(patches.device.type, enabled=False):
        return weights @ mean.gather(1, ids), weights @ std.gather(1, ids)


def _panels(
    images: Tensor,
    output: Output,
    patch_px: int,
    target: str,
    normalized: bool,
    statistics: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Rows:
    """Per image the four panels of its row, at the stage's own size (strokes: at theirs)."""
    grid = grid_of(tuple(images.shape[-2:]), patch_px)
    patch_kind = (NEITHER * output.mask.long()).scatter(1, output.predicted_ids, PREDICTED)  # [B, L]

    def compose(scale: int, layers: dict[int, Tensor | float]) -> list[Image.Image]:
        where = repeat(patch_kind, "b (h w) -> b 1 (h y) (w x)", h=grid[0], y=scale, x=scale)
        picture = _stripes(where, scale)
        for kind, layer in layers.items():
            picture = torch.where(where == kind, torch.as_tensor(layer, device=where.device), picture)
        return _to_images(picture)

    shown = _displayable(images, mean, std)
    columns = [_to_images(shown), compose(patch_px, {VISIBLE: shown, PREDICTED: GREY, NEITHER: GREY})]
    if target == "pixel":
        pred = predicted_pixels(images, output, patch_px, normalized=normalized, statistics=statistics)
        pred = _displayable(pred, mean, std)
        columns += [compose(patch_px, {VISIBLE: seen, PREDICTED: pred}) for seen in (_greyed(shown), shown)]
    else:
        cell_px = max(STROKE_CELL_PX, PANELS[0][0] // (2 * max(grid)))  # big enough not to be enlarged afterwards
        true = hog_target(images, patch_px)
        ids = output.predicted_ids.unsqueeze(-1).expand_as(output.pred)
        pred = torch.zeros_like(true).scatter_(1, ids, output.pred.float())
        strokes = hog_strokes(pred, grid, cell_px).unsqueeze(1)
        columns += [
            compose(2 * cell_px, {VISIBLE: SEEN_STROKES, PREDICTED: strokes}),
            _to_images(hog_strokes(true, grid, cell_px).unsqueeze(1)),
        ]
    return [list(row) for row in zip(*columns, strict=True)]


def _displayable(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo mean and std, clip to [0, 1], keep three channels or one: [B, C, h, w] -> [B, 3 or 1, h, w]."""
    mean, std = (torch.as_tensor(x, dtype=images.dtype, device=images.device)[:, None, None] for x in (mean, std))
    return (images * std + mean).clamp(0, 1)[:, : 3 if images.shape[1] >= 3 else 1]


def _greyed(shown: Tensor) -> Tensor:
    """Pale and without colour, [B, 1, h, w]: what the model saw, beside what it predicted."""
    return PALEST - CONTRAST * (1 - shown.mean(1, keepdim=True))


def _stripes(like: Tensor, patch_px: int) -> Tensor:
    """Diagonal stripes, [1, 1, h, w], for patches about which nothing is known."""
    period = max(4, patch_px // 2)
    y, x = (torch.arange(side, device=like.device) for side in like.shape[-2:])
    dark = (y[:, None] + x) % period < period / 2
    return torch.where(dark, GREY, STRIPE)[None, None]


def _to_images(pictures: Tensor) -> list[Image.Image]:
    """[B, 1 or 3, h, w] in [0, 1] -> RGB images."""
    pixels = (pictures * 255).round().byte().expand(-1, 3, -1, -1)
    return [Image.fromarray(p) for p in rearrange(pixels, "b c h w -> b h w c").cpu().numpy()]


def _caption(stage: Stage, patches: int, channels: int, target: str, normalized: bool, statistics: str) -> str:
    height, width = stage.height_width
    parts = [
        f"{height}×{width} px",
        f"{stage.num_visible} of {patches} patches visible, {stage.num_predicted} predicted",
    ]
    neither = patches - stage.num_visible - stage.num_predicted
    if neither:
        parts[-1] += f", {neither} neither (striped)"
    if stage.cutoff_px:
        parts.append(f"frequencies of {show_size(stage.cutoff_px)} px")
    if target == "hog":
        parts.append("strokes run along edges")
    elif normalized:
        parts.append(STATISTICS[statistics])
    else:
        parts.append("pixels as predicted")
    if channels not in (1, 3):
        parts.append(f"channels 1–3 of {channels} shown" if channels > 3 else f"channel 1 of {channels} shown")
    return "  ·  ".join(parts)


def _sheet(title: str, heads: Sequence[str], blocks: Sequence[Block], side_px: int) -> Image.Image:
    """Lay the blocks out, two images side by side where there are several, panels with a longer side of `side_px`."""
    title_font, font, head_font = load_font(17), load_font(13), load_font(12)
    title_height, caption_height, head_height = (30 if title else 0), 24, 20
    first = blocks[0][1]
    longer = max(first[0][0].size)
    panel = tuple(round(side_px * side / longer) for side in first[0][0].size)  # width, height
    cell_width = max(panel[0], *(math.ceil(head_font.getlength(head)) for head in heads))
    lefts = [
        MARGIN + column * (cell_width + GAP) + column // len(heads) * (GROUP_GAP - GAP)
        for column in range(len(heads) * min(2, len(first)))
    ]
    text_width = max(title_font.getlength(title), *(font.getlength(caption) for caption, _ in blocks))
    sheet_width = max(lefts[-1] + cell_width + MARGIN, MARGIN + math.ceil(text_width) + MARGIN)
    rows_height = math.ceil(len(first) * len(heads) / len(lefts)) * (panel[1] + GAP)
    block_height = caption_height + head_height + rows_height + MARGIN
    sheet = Image.new("RGB", (sheet_width, MARGIN + title_height + len(blocks) * block_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, title_font)
    boxes: list[dict[str, Any]] = []
    for number, (caption, rows) in enumerate(blocks):
        top = MARGIN + title_height + number * block_height
        draw.text((MARGIN, top), caption, WARNING if "LEAK" in caption else INK, font)
        for left, head in zip(lefts, itertools.cycle(heads)):
            draw.text((left, top + caption_height), head, FAINT, head_font)
        corners = []
        for place, picture in enumerate(itertools.chain(*rows)):
            row, column = divmod(place, len(lefts))
            corners.append((lefts[column], top + caption_height + head_height + row * (panel[1] + GAP)))
            sheet.paste(resized(picture, panel), corners[-1])
        inputs, predictions = corners[:: len(heads)], corners[2 :: len(heads)]
        boxes.append({"caption": caption, "panel": panel, "inputs": inputs, "predictions": predictions})
    sheet.info[PLACES] = json.dumps(boxes)
    return sheet


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Much enlarged, a small image should show its pixels, not a blur that the model never saw.
    sharp = size[0] >= 2 * picture.width
    return picture.resize(size, Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)


def load_font(size_px: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has no "×"; the one that matplotlib carries does.
    folder = importlib.util.find_spec("matplotlib").submodule_search_locations[0]  # importing it takes a quarter second
    return ImageFont.truetype(str(Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")), size_px)  # Pillow 10.0


def _encode(sheet: Image.Image, colors: int) -> bytes:
    """PNG with a palette: photographs shrink to a third, and text stays sharp."""
    buffer, text = io.BytesIO(), PngInfo()
    text.add_text(PLACES, sheet.info.get(PLACES, "[]"))
    sheet.quantize(colors, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True, pnginfo=text)
    return buffer.getvalue()

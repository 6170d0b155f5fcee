"""`python -m mae_et measure DATA`: what a data set holds, and the recipe and flags that follow from it."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from ..console import console
from ..plan.config import PretrainConfig
from ..plan.flags import from_recipe
from ..plan.shared import DataFlags, default_statistics
from .decode import jpeg_objection
from .loader import Corruption
from .pixels import CorruptImage, ValueRange, format_and_channels, measure_value_range, more_than_8_bits, to_image
from .sources import Source, open_source
from .workers import worker_options

MAX_MEASURED = 2000
"""Images that are decoded; of more, so many are taken, spread evenly. A mean is then known to about 0.005."""
NEAR_DEFAULT = 0.05
"""Means and standard deviations no further from the default are left at it, as weights of others expect it."""
SMALL_PX, LARGE_PX = 48, 160
"""Shorter sides, of the median image, from which the recipes for 64 px and for 224 px are proposed."""
PHOTOS, FASHION_MNIST = 3264, 60_000
"""Training images that the small recipes' epochs are meant for."""
MIN_STEPS, STEPS_PER_EPOCH = 20_000, 32
"""What --epochs and --total_batch_size are chosen to reach on GPUs where the images are few."""


class Look(NamedTuple):
    """What one image says."""

    format: str
    channels: int
    pixel_type: str
    size_px: tuple[int, int]
    """(height, width), upright."""
    values: tuple[float, float] | None
    """Smallest and largest finite stored value."""
    file_bytes: int
    mean: np.ndarray
    """Mean of the pixels in [0, 1], [channels]."""
    square: np.ndarray
    """Mean of their squares, [channels]."""
    objection: str
    """What the strict decoder says of an image that is decoded all the same."""


class Looks(Dataset):
    """Place in a sample of a source -> its Look, or its Corruption."""

    def __init__(self, source: Source, indices: list[int], value_range: ValueRange | None) -> None:
        self.source, self.indices, self.value_range = source, indices, value_range

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Look | Corruption:
        index = self.indices[place]
        try:
            item, _ = self.source.read(index)
            format_name, channels = format_and_channels(item)
            pixels = np.asarray(to_image(item, channels, self.value_range))
            stored = more_than_8_bits(item)
        except (CorruptImage, OSError) as error:
            return Corruption(index, self.source.name(index), str(error))
        stored = pixels if stored is None else stored
        finite = stored[np.isfinite(stored)]
        scaled = pixels.reshape(-1, channels) / np.float32(255)
        return Look(
            format=format_name,
            channels=channels,
            pixel_type=str(stored.dtype),
            size_px=pixels.shape[:2],
            values=(float(finite.min()), float(finite.max())) if finite.size else None,
            file_bytes=len(item) if isinstance(item, bytes) else 0,
            mean=scaled.mean(axis=0, dtype=np.float64),
            square=np.square(scaled).mean(axis=0, dtype=np.float64),
            objection=jpeg_objection(item),
        )


def measure(data_path: str) -> dict[str, Any]:
    """What `measure` prints, as plain values: of all images, or of MAX_MEASURED that are spread evenly.

    Mean and std are those of the pixels in [0, 1], every image counting the same, in as many channels as --in_chans.
    Raises FileNotFoundError or ValueError, in one line, where there are no usable images.
    """
    source = open_source(data_path)
    value_range = measure_value_range(source)
    count = min(MAX_MEASURED, len(source))
    dataset = Looks(source, [place * len(source) // count for place in range(count)], value_range)
    # A process more costs more than a few images take.
    loader = DataLoader(dataset, batch_size=None, **worker_options(None if count > 64 else 0))
    hidden = not console.is_terminal
    results = list(track(loader, "measuring", count, console=console, transient=True, disable=hidden))
    looks = [result for result in results if isinstance(result, Look)]
    corrupt = [result for result in results if isinstance(result, Corruption)]
    if not looks:
        raise ValueError(f"--data_path {data_path}: none of {count} images can be read; {_named(corrupt[0])}")
    in_chans = _channels(looks)
    fitting = [look for look in looks if look.channels in (in_chans, 1 if in_chans == 3 else in_chans)]
    mean = np.mean([np.broadcast_to(look.mean, in_chans) for look in fitting], axis=0)
    square = np.mean([np.broadcast_to(look.square, in_chans) for look in fitting], axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    heights, widths = np.array([look.size_px for look in looks]).T
    files = [look.file_bytes for look in looks if look.file_bytes]
    values = [value for look in looks for value in look.values or ()]
    report = {
        "data_path": data_path,
        "images": len(source),
        "held_out": _count_held_out(data_path),
        "classes": None if source.classes is None else len(source.classes),
        "measured": count,
        "formats": dict(Counter(look.format for look in looks).most_common()),
        "file_bytes": round(np.mean(files)) if files else None,
        "height_px": _spread(heights),
        "width_px": _spread(widths),
        "short_side_px": _spread(np.minimum(heights, widths)),
        "channels": {str(k): n for k, n in sorted(Counter(look.channels for look in looks).items())},
        "in_chans": in_chans,
        "other_channels": len(looks) - len(fitting),
        "pixel_types": dict(Counter(look.pixel_type for look in looks).most_common()),
        "values": [min(values), max(values)] if values else None,
        "value_range": None if value_range is None else list(value_range),
        "mean": [round(float(value), 4) for value in mean],
        "std": [round(float(value), 4) for value in std],
        "corrupt": [{"name": one.name, "reason": one.reason} for one in corrupt],
        "objections": sum(bool(look.objection) for look in looks),
    }
    return report | {"proposals": [proposal.to_dict(data_path) for proposal in proposals(report)]}


def _channels(looks: list[Look]) -> int:
    """--in_chans: 1 if all are grey, 3 if some are in colour, or of arrays what most have."""
    counts = Counter(look.channels for look in looks)
    if set(counts) <= {1, 3}:
        return max(counts)
    return counts.most_common(1)[0][0]


def _count_held_out(data_path: str) -> int | None:
    """None where there is no usable split of held-out images."""
    try:
        return len(open_source(data_path, "val"))
    except (ValueError, OSError):
        return None


def _spread(sizes: np.ndarray) -> dict[str, int]:
    return {"smallest": int(sizes.min()), "median": int(np.median(sizes)), "largest": int(sizes.max())}


# ── what follows ──


@dataclass(frozen=True)
class Proposal:
    """A recipe, and the flags that these images need beside it. A beginning: nothing in it is tuned."""

    why: str
    recipe: str
    flags: dict[str, str]

    def arguments(self, data_path: str) -> list[str]:
        """Arguments of main_pretrain.py."""
        words = [word for name, value in self.flags.items() for word in (f"--{name}", *value.split())]
        data = Path(data_path).resolve()
        name = re.sub(r"\W+", "-", data.name.partition(":")[0]).strip("-")
        out = Path("runs") / name
        if data.is_dir() and data in out.resolve().parents:  # it must not lie inside of the data
            out = data.parent / f"{name}-run"
        return ["--recipe", self.recipe, "--data_path", data_path, "--output_dir", str(out), *words]

    def to_dict(self, data_path: str) -> dict[str, Any]:
        command = shlex.join(["python", "main_pretrain.py", *self.arguments(data_path)])
        return {"why": self.why, "recipe": self.recipe, "flags": self.flags, "command": command}


def proposals(report: dict[str, Any]) -> list[Proposal]:
    """One for any machine, and where the images are large enough, one for GPUs."""
    short_side, images = report["short_side_px"]["median"], report["images"]
    small = short_side < SMALL_PX
    recipe, meant_for = ("fashion_mnist_etpp", FASHION_MNIST) if small and report["in_chans"] == 1 else ("fast", PHOTOS)
    config = from_recipe(PretrainConfig, recipe)
    grid = config.input_size // config.patch_size
    flags = {"input_size": "32", "patch_size": str(32 // grid)} if small and config.input_size > SMALL_PX else {}
    # As many images as the recipe sees: with fewer it would end before it has begun.
    flags |= _data_flags(report, config) | _length(config, config.epochs * meant_for / images)
    size_px = flags.get("input_size", config.input_size)
    found = [
        Proposal(f"{size_px} px on any machine, about as long as the recipe takes on its own images", recipe, flags)
    ]
    if short_side >= LARGE_PX:
        config = from_recipe(PretrainConfig, "in1k_vitb_etpp400")
        power = 2 ** int(math.log2(max(1, images / STEPS_PER_EPOCH)))
        batch = min(max(power, 256), config.total_batch_size)
        flags = {} if batch == config.total_batch_size else {"total_batch_size": str(batch)}
        flags |= _length(config, max(config.epochs, MIN_STEPS * batch / images))
        found.append(Proposal("ViT-B at 224 px, for GPUs", "in1k_vitb_etpp400", _data_flags(report, config) | flags))
    return found


def _data_flags(report: dict[str, Any], config: PretrainConfig) -> dict[str, str]:
    """What the images need that the recipe, or its default, doesn't say."""
    flags = {}
    if report["in_chans"] != config.in_chans:
        flags["in_chans"] = str(report["in_chans"])
    measured, default = (report["mean"], report["std"]), default_statistics(report["in_chans"])
    if np.abs(np.subtract(measured, default)).max() <= NEAR_DEFAULT or min(report["std"]) == 0:  # none to divide by
        measured = default
    if measured is not default or config.mean:  # the recipe's, of its own images
        flags |= {name: _numbers(values) for name, values in zip(("mean", "std"), measured, strict=True)}
    if report["value_range"]:
        flags["value_range"] = _numbers(report["value_range"])
    share = (len(report["corrupt"]) + report["other_channels"]) / report["measured"]
    if share > DataFlags.damaged_limit / 2:  # twice what was found: the others were not looked at
        flags["damaged_limit"] = f"{min(0.99, math.ceil(200 * share) / 100):g}"
    return flags


def _length(config: PretrainConfig, epochs: float) -> dict[str, str]:
    """--epochs and a warm-up of the same share; nothing where the recipe's own are meant."""
    lengths = {"epochs": epochs, "warmup_epochs": config.warmup_epochs * epochs / config.epochs}
    return {} if epochs == config.epochs else {name: f"{float(f'{n:.2g}'):.9g}" for name, n in lengths.items()}


# ── for people ──


def describe(report: dict[str, Any]) -> list[str]:
    """The lines that `measure` prints."""
    all_measured = report["measured"] == report["images"]
    held_out = "no held-out ones" if report["held_out"] is None else f"{report['held_out']:,} held out"
    classes = "no labels" if report["classes"] is None else f"{report['classes']:,} classes"
    size = f"; {report['file_bytes'] / 1e3:,.1f} kB a file" if report["file_bytes"] else ""
    side = report["short_side_px"]
    values = "{:g} to {:g}".format(*report["values"]) if report["values"] else "none of them finite"
    lines = {
        "images": f"{report['images']:,} for training, {held_out}; {classes}",
        "measured": "all of them" if all_measured else f"{report['measured']:,} of them, spread evenly",
        "formats": _counts(report["formats"]) + size,
        "sizes": f"height {_range(report['height_px'])}, width {_range(report['width_px'])}, shorter side "
        f"{_range(side)} px (smallest, median, largest)",
        "channels": ", ".join(f"{n:,} with {channels}" for channels, n in report["channels"].items()),
        "values": f"{_counts(report['pixel_types'])}; {values}"
        + (f", of which {_numbers(report['value_range'])} become black and white" if report["value_range"] else ""),
        "mean": _numbers(report["mean"]),
        "std": _numbers(report["std"]),
        "corrupt": f"{len(report['corrupt']):,}",
    }
    for one in report["corrupt"][:20]:
        lines["corrupt"] += f"\n           {one['name']}: {one['reason']}"
    if report["objections"]:
        lines["damaged"] = f"{report['objections']:,} JPEGs with holes or stray bytes, which are decoded all the same"
    if report["other_channels"]:
        lines["unfit"] = f"{report['other_channels']:,} images have other channels than {report['in_chans']}"
    shown = [f"{name:10} {text}" for name, text in lines.items()]
    if side["median"] > 512 and report["in_chans"] in (1, 3):
        grey = ["--in_chans", "1"] if report["in_chans"] == 1 else []  # or they are packed as colour
        packed = shlex.join(["python", "-m", "mae_et", "prepare", report["data_path"], "PACKED", *grey])
        shown += ["", "Images this large are quicker to read once they are packed smaller:", f"  {packed}"]
    for proposal in report["proposals"]:
        shown += ["", f"{proposal['why']}:", f"  {proposal['command']}"]
    return shown


def _named(one: Corruption) -> str:
    return f"{one.name}: {one.reason}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _range(spread: dict[str, int]) -> str:
    return " / ".join(f"{value:,}" for value in spread.values())


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:g}" for value in values)

"""Configuration of `python -m mae_et prepare` and `measure`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..plan.flags import FINITE, NOT_NEGATIVE, POSITIVE, RUN, Range, check

JPEG_QUALITY = Range("be 1 to 95", lambda value: 1 <= value <= 95)
JPEG_CHANNELS = Range("be 1 or 3, the channels of a JPEG", lambda value: value in (1, 3))


@dataclass(frozen=True)
class PrepareConfig:
    """Pack images into tar shards with an index, for --data_path. A second call goes on where the first was stopped."""

    source: Annotated[str, RUN, tyro.conf.Positional]
    """Images: a folder with train/ and val/, a flat folder, or anything else that --data_path takes."""
    out: Annotated[str, RUN, tyro.conf.Positional]
    """Folder to write."""
    short_side: Annotated[int, RUN, POSITIVE] = 256
    """Shorter side in pixels that larger images are brought to; smaller JPEGs are kept as they are."""
    quality: Annotated[int, RUN, JPEG_QUALITY] = 90
    """JPEG quality, 1 to 95."""
    shard_mb: Annotated[float, RUN, POSITIVE] = 256
    """Size at which a shard is full, in 1e6 bytes."""
    in_chans: Annotated[int, RUN, JPEG_CHANNELS] = 3
    """Channels: 3 (colour) or 1 (grey)."""
    value_range: Annotated[tuple[float, float] | None, RUN, FINITE] = None
    """Values of pixels that become black and white, for images of more than 8 bits; default: measured."""
    num_workers: Annotated[int | None, RUN, NOT_NEGATIVE] = None
    """Processes that decode and encode; default: the cores there are, at most 10."""

    def __post_init__(self) -> None:
        check(self)
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"--value_range must be LOW HIGH with LOW < HIGH, got {self.value_range}")
        for name, path in (("SRC", self.source), ("OUT", self.out)):
            if not path:
                raise ValueError(f"{name} is empty; give a folder, or . for this one")
        source, out = Path(self.source.removeprefix("wds/")), Path(self.out).resolve()
        if source.is_dir() and source.resolve() in (out, *out.parents):
            raise ValueError(f"OUT {self.out} is inside SRC {self.source}: its shards would become data")


@dataclass(frozen=True)
class MeasureConfig:
    """Say what a data set holds, and which recipe and flags to pretrain on it with."""

    data_path: Annotated[str, RUN, tyro.conf.Positional]
    """Images: a folder, or anything else that --data_path takes."""
    json: Annotated[bool, RUN] = False
    """Machine-readable output."""

    def __post_init__(self) -> None:
        if not self.data_path:
            raise ValueError("DATA is empty; give a folder, a timm dataset name, or photos")

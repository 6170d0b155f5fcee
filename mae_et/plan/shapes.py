"""Sizes in pixels, grids of patches and the shape of a model: what its cost follows from. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

Kept = TypeVar("Kept")
SizePx = int | tuple[int, int]
"""Side of a square in pixels, or (height, width)."""

NORM_EPS = 1e-6  # MAE, as in ViT
#: How an image becomes small, and where. The spectral ones are exact; tests state how far the others are from them.
OPERATORS = {
    "fourier": "exact crop of the Fourier spectrum, on the device, from the full-size image; rings at unequal borders",
    "dct": "exact crop of the cosine spectrum (borders mirrored), on the device, from the full-size image",
    "lanczos": "Lanczos resize of the full-size crop in the loader (ET++'s efficient down-sampling)",
    "bilinear": "the same with antialiased bilinear: blurrier, for comparison",
    "scaled": "DCT-scaled JPEG decoding, then one Lanczos resize in the loader: the cheapest",
}
#: Operators on the device, whose images leave the loader at full size.
SPECTRAL = ("fourier", "dct")
#: How the decoder's queries see the rest.
DECODERS = {
    "self": "queries and visible patches attend to each other, as in MAE",
    "cross": "queries attend to the visible patches only, as in CrossMAE: cheaper",
}
TARGETS = ("pixel", "hog")
HOG_BINS = 9  # MaskFeat, Sec. 3.2: 9 unsigned orientations

#: Encoder width, depth, heads and patch of each size (MAE, Sec. 4; tiny and small as in DeiT, arXiv 2012.12877).
SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}
MODELS = tuple(f"mae_vit_{size}_patch{shape['patch_size']}" for size, shape in SIZES.items())
#: Encoder width -> heads, of the models above.
KNOWN_HEADS = {shape["embed_dim"]: shape["num_heads"] for shape in SIZES.values()}


def choice(name: str, value: str, legal: Iterable[str]) -> str:
    """`value`, if it is one of `legal`; else a ValueError that lists them and, of flags and of many, guesses which."""
    legal = list(legal)
    if value not in legal:
        guess = name.startswith("--") or len(legal) > 4
        close = difflib.get_close_matches(str(value), legal, n=1) if guess else []
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown {name} {value!r}{hint}; choose from {', '.join(legal)}")
    return value


def of_file(kind: type[Kept], values: Mapping[str, Any], where: str) -> Kept:
    """A dataclass from its values in a file. ValueError for fields that only a newer version of this package knows."""
    if unknown := values.keys() - {f.name for f in dataclasses.fields(cast(Any, kind))}:
        raise ValueError(f"{where} holds {', '.join(sorted(unknown))}: a newer mae_et has written it; update this one")
    return kind(**values)


# ── sizes ──


def height_width(size_px: SizePx) -> tuple[int, int]:
    """(height, width) of a size given as one number (square) or as (height, width)."""
    return (size_px, size_px) if isinstance(size_px, int) else (int(size_px[0]), int(size_px[1]))


def as_size(size_px: SizePx | Sequence[int]) -> SizePx:
    """One number for a square, (height, width) otherwise: one way to write each size, so sizes compare equal."""
    if isinstance(size_px, int):
        return size_px
    if len(size_px) not in (1, 2) or not all(isinstance(side, int) for side in size_px):
        raise ValueError(f"a size is one integer or (height, width) in pixels; got {size_px!r}")
    height, width = size_px[0], size_px[-1]
    return height if height == width else (height, width)


def area_px(size_px: SizePx) -> int:
    return math.prod(height_width(size_px))


def fits_in(size_px: SizePx, outer_px: SizePx) -> bool:
    """Whether neither side is longer. Sizes that differ both ways fit neither way."""
    return all(side <= outer for side, outer in zip(height_width(size_px), height_width(outer_px), strict=True))


def show_size(size_px: SizePx) -> str:
    """224 or 224×160."""
    return str(size_px) if isinstance(size_px, int) else "×".join(map(str, size_px))


def spectral_operator(operator: str) -> str:
    """Crop of full-size images: the operator itself, or, where the loader resizes, the one that a resize comes near."""
    return operator if operator in SPECTRAL else "dct"


def grid_of(size_px: SizePx, patch_px: int, what: str = "size") -> tuple[int, int]:
    """Patches (rows, columns) of an image. ValueError, about `what`, if a side is no positive multiple of the patch."""
    height, width = height_width(size_px)
    if height < patch_px or width < patch_px or height % patch_px or width % patch_px:
        raise ValueError(
            f"{what} {show_size(size_px)} px is not divisible by the patch ({patch_px} px): {_near(size_px, patch_px)}"
        )
    return height // patch_px, width // patch_px


def num_patches(size_px: SizePx, patch_px: int) -> int:
    """L, patches of an image. Errors as in :func:`grid_of`."""
    return math.prod(grid_of(size_px, patch_px))


def _near(size_px: SizePx, patch_px: int) -> str:
    def nearest(side: int) -> int:
        return max(patch_px, round(side / patch_px) * patch_px)

    return f"{show_size(as_size(tuple(nearest(side) for side in height_width(size_px))))} px would be"


# ── models ──


def target_dim(target: str, patch_size: int, in_chans: int) -> int:
    """D: values per patch that the decoder predicts."""
    if target == "hog" and patch_size % 2:
        raise ValueError(f"--target hog has 2 × 2 cells in a patch, so --patch_size must be even, got {patch_size}")
    return {"pixel": patch_size**2 * in_chans, "hog": in_chans * HOG_BINS * 4}[target]


def model_shape(name: str) -> dict[str, int]:
    """Encoder width, depth, heads and patch of a model name; ValueError lists the legal ones.

    `mae_vit_base_patch16`, `vit_base_patch16` and `mae_vit_base_patch16_dec512d8b` are the same model here.
    """
    short = name.removesuffix("_dec512d8b")
    short = short if short.startswith("mae_") else f"mae_{short}"
    if short not in MODELS:
        choice("--model", short, MODELS)
    return dict(SIZES[short.split("_")[2]])


@dataclass(frozen=True, eq=False)
class ModelShape(Mapping):
    """The arguments of `create_mae`: all that fixes the weights and the cost of a model.

    Also the mapping of :meth:`to_dict`, so that `create_mae(**shape)` builds it; it equals such a mapping. Raises
    ValueError for what can't be built.
    """

    img_size: SizePx = 224
    """Full size in pixels; any smaller multiple of the patch may be fed in."""
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    target_dim: int = 0
    """Values predicted per patch; 0, or None, becomes the patch's pixels."""
    own_positions: bool = False
    """Number the patches of a smaller grid from zero, instead of in coordinates of the full grid."""
    decoder: str = "self"
    """A key of DECODERS."""
    norm_eps: float = NORM_EPS
    """Of all layer norms."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", as_size(self.img_size))
        object.__setattr__(self, "target_dim", self.target_dim or target_dim("pixel", self.patch_size, self.in_chans))
        grid_of(self.img_size, self.patch_size)
        choice("decoder", self.decoder, DECODERS)
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}embed_dim"), getattr(self, f"{prefix}num_heads")
            if width % heads or width % 4:
                raise ValueError(
                    f"{prefix}embed_dim {width} must be divisible by {prefix}num_heads {heads}, and by 4 for the 2-D "
                    "sin-cos position table"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns) at full size."""
        return grid_of(self.img_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """L at full size."""
        return math.prod(self.grid)

    @property
    def num_parameters(self) -> int:
        """Trained parameters, the decoder's included; position tables are fixed."""
        decoder_block = _cross_block_parameters if self.decoder == "cross" else _block_parameters
        return (
            _linear_parameters(self.patch_size**2 * self.in_chans, self.embed_dim)
            + self.embed_dim  # class token
            + self.depth * _block_parameters(self.embed_dim, self.mlp_ratio)
            + 2 * self.embed_dim  # norm
            + _linear_parameters(self.embed_dim, self.decoder_embed_dim)
            + self.decoder_embed_dim  # mask token
            + self.decoder_depth * decoder_block(self.decoder_embed_dim, self.mlp_ratio)
            + 2 * self.decoder_embed_dim
            + _linear_parameters(self.decoder_embed_dim, self.target_dim)
        )

    def to_dict(self, decoder: bool = True) -> dict[str, Any]:
        """Plain values for files; own ways of this package are left out where MAE's are taken.

        decoder: False leaves out the decoder's arguments.
        """
        values = dataclasses.asdict(self)
        if not decoder:
            values = {k: v for k, v in values.items() if not k.startswith("decoder") and k != "target_dim"}
        for name, maes in (("own_positions", False), ("decoder", "self"), ("norm_eps", NORM_EPS)):
            if values.get(name) == maes:
                del values[name]
        return values

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self.to_dict() == ModelShape(**other).to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))


def _linear_parameters(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _mlp_parameters(width: int, mlp_ratio: float) -> int:
    hidden = int(width * mlp_ratio)
    return _linear_parameters(width, hidden) + _linear_parameters(hidden, width)


def _block_parameters(width: int, mlp_ratio: float) -> int:
    attention = _linear_parameters(width, 3 * width) + _linear_parameters(width, width)
    return 2 * 2 * width + attention + _mlp_parameters(width, mlp_ratio)


def _cross_block_parameters(width: int, mlp_ratio: float) -> int:
    attention = 2 * _linear_parameters(width, width) + _linear_parameters(width, 2 * width)
    return 3 * 2 * width + attention + _mlp_parameters(width, mlp_ratio)

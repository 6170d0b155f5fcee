"""The encoder that is judged: its weights from anywhere, as a timm classifier, its position table fitted to the input.

B batch · C channels · K classes · L patches · D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .. import checkpoint, interop
from ..data.pixels import measure_value_range
from ..data.sources import Source, is_same_path
from ..data.stream import derive_seed
from ..engine.run_folder import run_of
from ..engine.runtime import Runtime
from ..model import MaskedAutoencoder, same_table, sincos_table
from ..plan.cost import encoder_flops_per_image
from ..plan.flags import MODEL, names
from ..plan.shapes import ModelShape, SizePx, grid_of, height_width, model_shape, num_patches
from ..plan.shared import check_statistics, default_statistics
from ..record import INTERPOLATION, WeightsRecord, default_crop_pct
from .config import FinetuneConfig

log = logging.getLogger(__name__)

HEAD_STD = 2e-5  # MAE, as in facebookresearch/mae's fine-tuning


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder, pretrained or from scratch, and what its pretraining says about the data."""

    shape: ModelShape
    state: dict[str, Tensor]
    """`encoder.*` of `MaskedAutoencoder.state_dict()`."""
    origin: str
    """Where the weights come from, for people."""
    input_size: SizePx
    """Full size of what is classified; `shape.img_size` is what the encoder was made for."""
    record: WeightsRecord
    """How images must look: `mean`, `std` and `crop_pct` are always known, from flags, the weights or defaults."""
    data_path: str
    folder: Path | None = None
    """Run folder of the checkpoint."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """Classifier that came with the weights: `head.*`, and `fc_norm.*` where it pools patches."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where each fact of the record comes from."""
    ours: bool = False
    """See `Pretrained`; of what it is like, too."""
    step: int | None = None
    """Steps that it was trained for, where the checkpoint says so."""

    @contextmanager
    def explained(self, config: FinetuneConfig) -> Iterator[None]:
        """Say of missing images, if no flag named them, who did."""
        try:
            yield
        except FileNotFoundError as error:
            if config.data_path:
                raise
            raise FileNotFoundError(
                f"{error}; that is what {self.origin} was trained on, seen from another folder or machine: give "
                "--data_path"
            ) from error

    def with_value_range(self, train: Source, rt: Runtime) -> PretrainedEncoder:
        """The range of the images' values, measured on training images where nobody states one."""
        if self.record.value_range:
            return self
        measured = rt.from_main(measured_range(train, self.ours, self.origin) if rt.is_main else None)
        return replace(self, record=replace(self.record, value_range=measured)) if measured else self

    def log_record(self) -> None:
        """Log how images are normalised and cropped, and who says so."""
        for name, source in self.sources.items():
            value = getattr(self.record, name)
            shown = " ".join(f"{v:.4g}" for v in value) if isinstance(value, tuple) else value
            log.info("%s %s, from %s", name, shown, source)

    @property
    def mean(self) -> tuple[float, ...]:
        return self.record.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.record.std

    @property
    def num_patches(self) -> int:
        return num_patches(self.input_size, self.shape.patch_size)

    @property
    def flops_per_image(self) -> int:
        """Forward FLOPs of the encoder on one image."""
        return encoder_flops_per_image(self.shape, self.num_patches)


def measured_range(images: Source, ours: bool, origin: str) -> tuple[float, float] | None:
    """The range of values of images for weights that state none. ours: they were trained without one, and stay so."""
    measured = measure_value_range(images)
    if measured and ours:
        log.warning(
            "%s was trained on images as they are, so these are not stretched either; --value_range %g %g would",
            *(origin, *measured),
        )
        return None
    return measured


def load_encoder(config: FinetuneConfig) -> PretrainedEncoder:
    """Weights, or from scratch the architecture, that a configuration starts from.

    Raises FileNotFoundError, CheckpointError, or ValueError if flags contradict the checkpoint or don't fit together,
    or if its weights are not finite.
    """
    source, facts, trained_on, head, step, ours = config.finetune or config.like, WeightsRecord(), {}, {}, None, False
    if source:
        pretrained = checkpoint.read_pretrained(source, encoder_only=True, num_heads=config.num_heads)
        shape, facts, head = pretrained.shape, pretrained.record, pretrained.head
        trained_on, ours = pretrained.training.get("config", {}), pretrained.ours
        _check_architecture(config, shape, pretrained.origin)
    elif config.model:
        shape = ModelShape(
            **{"img_size": config.input_size or 224} | model_shape(config.model) | _architecture_flags(config)
        )
    else:
        raise ValueError("from scratch (without --finetune), --model or --like must say what to train")
    if config.finetune:
        state, origin, step = pretrained.state, pretrained.origin, pretrained.training.get("step")
        pretrained.warn_if_unfinished()
        for name, tensor in (state | head).items():
            if not tensor.isfinite().all():
                raise ValueError(f"{origin}: {name} holds numbers that are not finite; give other weights")
    else:  # as an encoder is before pretraining, so that only pretraining makes the difference
        torch.manual_seed(derive_seed(config.seed, "weights"))
        state, origin = interop.encoder_only(MaskedAutoencoder(**shape).state_dict()), "scratch"
    size = shape.img_size if config.input_size is None else config.input_size
    grid_of(size, shape.patch_size)  # refuses sizes that don't divide
    facts, sources = complete_record(config, facts, shape.in_chans, size)
    data_path = config.data_path or trained_on.get("data_path", "")
    if not data_path:
        raise ValueError("--data_path is needed: the checkpoint doesn't say what it was trained on")
    kept_out = trained_on.get("holdout", 0)  # the smaller of two holdouts lies in the larger
    own = is_same_path(trained_on.get("data_path", ""), data_path)
    if config.finetune and own and kept_out < config.holdout:
        log.warning(
            "--holdout %d: %s was pretrained with --holdout %d, on some of these", config.holdout, origin, kept_out
        )
    folder = run_of(config.finetune) if config.finetune else None
    head = head if config.finetune else {}
    return PretrainedEncoder(shape, state, origin, size, facts, data_path, folder, head, sources, ours, step)


def complete_record(
    config: FinetuneConfig, facts: WeightsRecord, in_chans: int, size_px: SizePx
) -> tuple[WeightsRecord, dict[str, str]]:
    """How images are normalised and cropped: by flags, else by the weights, else by default; and which, by name."""
    flags = WeightsRecord(config.mean, config.std, config.value_range, config.crop_pct, source="flags")
    crop_pct = default_crop_pct(size_px)
    default = WeightsRecord(
        *default_statistics(in_chans), crop_pct=crop_pct, interpolation=INTERPOLATION, source="default"
    )
    complete = flags.completed_by(facts).completed_by(default)
    check_statistics(complete.mean, complete.std, in_chans, f"{in_chans} channels")
    sources = {}
    for name in ("mean", "std", "value_range", "crop_pct", "interpolation"):
        if getattr(complete, name) is None:
            continue
        known = next(each for each in (flags, facts, default) if getattr(each, name) is not None)
        sources[name] = known.source or "the weights"
    return complete, sources


def build_classifier(
    encoder: PretrainedEncoder,
    num_classes: int,
    pooled: bool,
    drop_path: float = 0.0,
    head: Mapping[str, Tensor] | None = None,
) -> VisionTransformer:
    """A timm ViT with the encoder, strictly loaded, its position table adapted to the input size.

    pooled: mean of the patch tokens, then a new `fc_norm`; else the class token after the encoder's norm. head: weights
    of a fine-tuned `head` (and `fc_norm`); default: N(0, 2e-5) and zeros. num_classes 0: no head.
    """
    shape = encoder.shape
    vit = VisionTransformer(
        img_size=height_width(encoder.input_size),
        patch_size=shape.patch_size,
        in_chans=shape.in_chans,
        num_classes=num_classes,
        global_pool="avg" if pooled else "token",
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        mlp_ratio=shape.mlp_ratio,
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=shape.norm_eps),
    )
    state = {key.removeprefix("encoder."): tensor for key, tensor in encoder.state.items()}
    grids = (grid_of(size, shape.patch_size) for size in (shape.img_size, encoder.input_size))
    state["pos_embed"] = adapt_positions(state["pos_embed"], *grids, shape.own_positions)
    if pooled:
        del state["norm.weight"], state["norm.bias"]
        state |= {key: tensor for key, tensor in vit.state_dict().items() if key.startswith("fc_norm.")}
    if num_classes:
        nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
        nn.init.zeros_(vit.head.bias)
        state |= {f"head.{key}": tensor for key, tensor in vit.head.state_dict().items()}
    vit.load_state_dict(state | dict(head or {}))
    return vit


def adapt_positions(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], own_positions: bool = False
) -> Tensor:
    """Position table [1, 1+L, D] for another grid. MAE's fixed table is evaluated there; a learned one is resampled.

    own_positions: see `ModelShape`.
    """
    if old_grid == new_grid:
        return table
    width = table.shape[-1]
    if width % 4 == 0 and same_table(table[0, 1:], sincos_table(width, old_grid, old_grid)):
        moved = sincos_table(width, new_grid, new_grid if own_positions else old_grid)[None].to(table)
        return torch.cat([table[:, :1], moved], dim=1)
    return resample_abs_pos_embed(table, list(new_grid), list(old_grid), num_prefix_tokens=1)


def _architecture_flags(config: FinetuneConfig) -> dict[str, int]:
    """Arguments of the encoder that flags give."""
    flags = names(type(config), lambda role: role is MODEL)
    values = {name: getattr(config, name) for name in flags if name in ModelShape.__dataclass_fields__}
    return {name: value for name, value in values.items() if value is not None}


def _check_architecture(config: FinetuneConfig, shape: ModelShape, origin: str) -> None:
    """ValueError that names both if flags ask for another architecture than the checkpoint's."""
    asked = (model_shape(config.model) if config.model else {}) | _architecture_flags(config)
    # A name alone says less than the shape of a run that changed its patch or depth: then give the flags, or no name.
    if any(shape[name] != value for name, value in asked.items()):
        given = _architecture_flags(config) | ({"model": config.model} if config.model else {})
        flags = " ".join(f"--{name} {value}" for name, value in given.items())
        other = [name for name, value in asked.items() if shape[name] != value]
        wanted, held = (", ".join(f"{name} {of[name]}" for name in other) for of in (asked, shape))
        raise ValueError(f"{flags} ({wanted}) is another architecture than {origin} ({held})")


def weights_of(model: VisionTransformer) -> dict[str, dict[str, Tensor]]:
    """The encoder in our layout, so that a fine-tuned checkpoint can be probed or exported, and the head beside it."""
    state = model.state_dict()
    return {"model": interop.from_timm(state), "head": {k: v for k, v in state.items() if k.startswith("head.")}}

"""From a configuration to whole steps and their cost, before anything is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from .config import PretrainConfig, from_recipe
from .cost import Ledger, encoder_flops_per_image, flops_per_image, input_flops_per_image
from .curriculum import Curriculum, Stage, grid_of, height_width, plan_stages, scheduled, show_size
from .data.sources import is_prepared, open_source
from .model import MaskedAutoencoder, model_shape
from .scaling import Cluster, scaling_report
from .targets import target_dim


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """Print what a configuration will cost, before any training: all flags of pretraining, and these."""

    vs: str = ""
    """Recipe to compare with; default: the same configuration as vanilla MAE."""
    finetune_epochs: float = 100
    """Epochs of fine-tuning to estimate; MAE takes 100 for ViT-B, 50 for ViT-L and ViT-H."""
    json: bool = False
    """Machine-readable output."""

    # ── scaling on paper ──
    devices: int | None = None
    """Devices to plan for; default: world_size."""
    device_flops: float | None = None
    """Peak FLOP/s of a device; with it, hours are predicted."""
    utilisation: float = 0.4
    """Share of the peak that training achieves."""
    link: float | None = None
    """Bytes a second from a device to the next, for the gradients' all-reduce; default: as if it were free."""
    images_per_second: float | None = None
    """Images a second that the loaders of a device deliver; default: as if they were always there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("devices", "device_flops", "utilisation", "link", "images_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} must be positive and finite, got {value}")
        if self.utilisation > 1:
            raise ValueError(f"--utilisation is a share of --device_flops, at most 1, got {self.utilisation}")
        for name in ("link", "images_per_second"):
            if getattr(self, name) and not self.device_flops:
                raise ValueError(f"--{name} predicts hours only together with --device_flops")


def model_kwargs(config: PretrainConfig) -> dict[str, Any]:
    """Arguments of :class:`MaskedAutoencoder`: the named model, and what the configuration changes about it."""
    changes = {
        "img_size": config.input_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "decoder_embed_dim": config.decoder_embed_dim,
        "decoder_depth": config.decoder_depth,
        "decoder_num_heads": config.decoder_num_heads,
        # What is MAE's own way is left out of shapes that other programs read.
        "own_positions": config.own_positions or None,
        "decoder": None if config.decoder == "self" else config.decoder,
    }
    kwargs = model_shape(config.model) | {k: v for k, v in changes.items() if v is not None}
    return kwargs | {"target_dim": target_dim(config.target, kwargs["patch_size"], config.in_chans)}


def describe_model(config: PretrainConfig) -> MaskedAutoencoder:
    """The model without memory for its weights: enough for its shape and its cost."""
    with torch.device("meta"):
        return MaskedAutoencoder(**model_kwargs(config))


def build_curriculum(config: PretrainConfig, num_images: int, devices: int = 1) -> Curriculum:
    """The stages of a configuration in whole steps, for a data set of `num_images` on so many devices."""
    model = describe_model(config)
    batch_size = config.total_batch_size or config.batch_size * (config.accum_iter or 1) * devices

    def flops(stage: Stage) -> float:
        return flops_per_image(model, stage) + input_flops_per_image(
            config.input_size, stage.size_px, config.in_chans, config.lowfreq
        )

    common = {
        "epochs": config.epochs,
        "num_images": num_images,
        "batch_size": batch_size,
        "full_size_px": config.input_size,
        "patch_px": model.patch_size,
        "mask_ratio": config.mask_ratio,
        "predict_ratio": config.predict_ratio,
        "allocation": config.allocation,
        "crop_scale": config.crop_scale,
        "augment": config.augment,
        "replay": config.replay,
        "views_per_image": config.views_per_image,
        "masks_per_image": config.masks_per_image,
        "early_large_batch": config.early_large_batch,
        "max_batch_size": config.max_batch_size,
        "lr_scaling": config.lr_scaling,
        "devices": devices,
        "flops_per_image": flops,
    }
    if config.curriculum == "custom":
        _check_sizes(config)
        curriculum = plan_stages(config.stages, share_of=config.share_of, **common)
    else:
        curriculum = scheduled(config.curriculum, **common)
    smallest = min(stage.batch_size for stage in curriculum.stages)
    if smallest < devices:
        raise ValueError(
            f"total_batch_size: a stage's batch of {smallest} is smaller than the number of devices, {devices}"
        )
    views = config.views_per_image * config.masks_per_image
    for name, size in (("--batch_size", config.batch_size), ("total batch / devices", batch_size / devices)):
        if views > 1 and size % views:  # without views, ranks may have uneven shares
            raise ValueError(
                f"{name} {size:g} must be a multiple of {views}, the --views_per_image × --masks_per_image of an image"
            )
    return replace(curriculum, stages=tuple(_with_buffer(stage, config) for stage in curriculum.stages))


def _with_buffer(stage: Stage, config: PretrainConfig) -> Stage:
    """The stage with a replay buffer as deep as --replay_gib allows, if it replays."""
    if stage.replay == 1:
        return stage
    size_px = config.input_size if config.lowfreq == "fourier" else stage.size_px  # fourier crops are cut down later
    step_bytes = stage.batch_size // config.masks_per_image * config.in_chans * math.prod(height_width(size_px))
    depth = min(int(config.replay_gib * 2**30) // step_bytes, -(-stage.steps // stage.replay))
    if depth < 1:
        raise ValueError(
            f"--replay_gib {config.replay_gib:g} is less than one step of the stage of {show_size(stage.size_px)} px, "
            f"{step_bytes / 2**30:.2g} GiB; raise it, or don't replay"
        )
    return replace(stage, replay_depth=depth, replay_bytes=depth * step_bytes)


def _check_sizes(config: PretrainConfig) -> None:
    full = height_width(config.input_size)
    for row in config.stages:
        if any(side > whole for side, whole in zip(height_width(row.size_px), full, strict=True)):
            raise ValueError(f"stages: size {row.size_px} px is larger than --input_size {config.input_size}")


def vanilla_twin(config: PretrainConfig) -> PretrainConfig:
    """The same configuration as vanilla MAE."""
    return replace(config, curriculum="vanilla", stages=(), share_of="compute")


def count_images(config: PretrainConfig) -> int:
    """Images in the data set; where the data are not at hand, what the recipe says."""
    try:
        return len(open_source(config.data_path, "train", config.holdout))
    except (ValueError, OSError):
        if config.num_images is None:
            raise
        return config.num_images - config.holdout


def plan_report(config: PlanConfig) -> dict[str, Any]:
    """What `plan` prints, as plain values. FLOPs are training FLOPs: forward, backward and input operators."""
    other = from_recipe(PretrainConfig, config.vs) if config.vs else vanilla_twin(config)
    devices = config.devices or config.world_size
    plan, against = (build_curriculum(c, count_images(c), devices) for c in (config, other))
    model = describe_model(config)
    patch_px = model.patch_size
    # Forward and backward of the encoder on all patches of all images, at full size; the head is too small to count.
    finetune = 3 * encoder_flops_per_image(model, model.num_patches) * config.finetune_epochs * plan.num_images
    return {
        "recipe": config.recipe or config.curriculum,
        "stages": [
            {
                "size_px": stage.size_px,
                "patches": grid_of(stage.size_px, patch_px)[0] * grid_of(stage.size_px, patch_px)[1],
                "num_visible": stage.num_visible,
                "num_predicted": stage.num_predicted,
                "batch_size": stage.batch_size,
                "passes": plan.passes(stage),
                "steps": stage.steps,
                "images": stage.images,
                "decoded_images": stage.decoded_before(stage.steps),
                "replay": stage.replay,
                "replay_bytes": stage.replay_bytes,
                "gflops_per_image": stage.flops_per_image / 1e9,
                "compute_share": stage.flops / plan.total_flops,
                "lr_scale": stage.lr_scale,
                "images_per_device": stage.batch_size / devices,
                "gflops_per_device_step": stage.batch_size / devices * stage.flops_per_image / 1e9,
            }
            for stage in plan.stages
        ],
        "totals": _totals(plan) | {"remainder_images": plan.remainder_images},
        "finetune": {"epochs": config.finetune_epochs, "flops": finetune},
        "vs": {
            "recipe": config.vs or "the same as vanilla MAE",
            "totals": _totals(against),
            "speedup_flops": against.total_flops / plan.total_flops,
            # How much the same number of images would have cost at the other plan's cost per image.
            "flops_same_images": plan.total_images * against.total_flops / against.total_images,
        },
        **_scaling(config, plan, model, devices),
    }


def _scaling(config: PlanConfig, plan: Curriculum, model: MaskedAutoencoder, devices: int) -> dict[str, Any]:
    """{"scaling": …} where the devices are described."""
    if not config.device_flops:
        return {}
    cluster = Cluster(devices, config.device_flops, config.utilisation, config.link, config.images_per_second)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"scaling": scaling_report(plan, trained, cluster)}


def _totals(plan: Curriculum) -> dict[str, float]:
    return {
        "flops": plan.total_flops,
        "images": plan.total_images,
        "decoded_images": plan.decoded_images,
        "passes": plan.total_images / plan.num_images,
        "steps": plan.total_steps,
    }


def plan_table(report: dict[str, Any]) -> Table:
    """The stages of a :func:`plan_report` as a table."""
    heads = ("size", "patches", "visible", "predicted", "batch", "passes", "steps", "images", "GFLOPs/image", "compute")
    heads += ("per device", "TFLOPs/step")
    table = Table(title=f"Plan of {report['recipe']}", title_justify="left")
    for head in heads:
        table.add_column(head, justify="right")
    for row in report["stages"]:
        table.add_row(
            show_size(row["size_px"]),
            *(f"{row[key]:,}" for key in ("patches", "num_visible", "num_predicted", "batch_size")),
            f"{row['passes']:.1f}",
            f"{row['steps']:,}",
            f"{row['images']:,}",
            f"{row['gflops_per_image']:.3g}",
            f"{row['compute_share']:.1%}",
            f"{row['images_per_device']:,.0f}",
            f"{row['gflops_per_device_step'] / 1e3:.3g}",
        )
    total = report["totals"]
    table.add_section()
    table.add_row(
        *("total", "", "", "", ""),
        f"{total['passes']:.1f}",
        f"{total['steps']:,}",
        f"{total['images']:,}",
        "",
        "100%",
        "",
        "",
    )
    return table


def plan_summary(report: dict[str, Any]) -> list[str]:
    """The comparison, in sentences."""
    total, vs, finetune = report["totals"], report["vs"], report["finetune"]
    decoded = []
    if total["decoded_images"] < total["images"]:
        share = total["decoded_images"] / total["images"]
        decoded.append(f"{total['decoded_images']:,} images are decoded for {total['images']:,} seen, {share:.0%}")
    for row in report["stages"]:
        if row["replay_bytes"]:
            decoded.append(
                f"{show_size(row['size_px'])} px shows each decoded sample in {row['replay']} steps; its replay buffer "
                f"takes {row['replay_bytes'] / 2**30:.2f} GiB over all devices"
            )
    return [
        *decoded,
        f"{total['flops']:.3e} training FLOPs; whole steps leave {total['remainder_images']:+.0f} images over",
        f"{vs['recipe']}: {vs['totals']['flops']:.3e} FLOPs for {vs['totals']['passes']:.1f} passes, "
        f"{vs['speedup_flops']:.2f}× the cost of this plan",
        f"fine-tuning for {finetune['epochs']:g} epochs at full size: {finetune['flops']:.3e} FLOPs, "
        f"{finetune['flops'] / total['flops']:.2f}× this plan",
        f"the same {total['images']:,} images there: {vs['flops_same_images']:.3e} FLOPs, "
        f"{vs['flops_same_images'] / total['flops']:.2f}×",
    ]


MOST_WAITING = 0.1
"""Share of a stage's time that may pass waiting for data before the end of a run says what helps."""


def remedies(config: PretrainConfig, plan: Curriculum, ledger: Ledger, is_jpeg: bool, spare_cores: int) -> list[str]:
    """A line for every stage that waited for data too long, with what would help."""
    lines = []
    for i, (stage, account) in enumerate(zip(plan.stages, ledger.stages, strict=True)):
        if account.data_wait <= MOST_WAITING:
            continue
        full = stage.height_width == height_width(config.input_size)
        choices = {
            f"more --num_workers ({spare_cores} cores are left)": spare_cores > 0,
            "--lowfreq scaled (decodes JPEGs smaller)": is_jpeg and config.lowfreq != "scaled" and not full,
            "--replay": stage.replay == 1 and not full,
            "--views_per_image 2": stage.views_per_image == 1,
            "python -m mae_et prepare (smaller files)": is_jpeg and not is_prepared(config.data_path),
        }
        fitting = [choice for choice, fits in choices.items() if fits]
        lines.append(
            f"stage {i + 1}, {show_size(stage.size_px)} px, waited for data {account.data_wait:.0%} of its time; what "
            f"helps: {', '.join(fitting) or 'more cores'}"
        )
    return lines


def ledger_table(ledger: Ledger, curriculum: Curriculum, vanilla_flops_per_image: float) -> Table:
    """What a run has cost, stage by stage, next to vanilla MAE's FLOPs for the same number of images."""
    heads = (
        "size",
        "steps",
        "images",
        "decoded",
        "images/s",
        "seconds",
        "data wait",
        "FLOPs",
        "share",
        "vanilla FLOPs",
        "ratio",
    )
    table = Table(title="Cost, and vanilla MAE's for the same images", title_justify="left")
    for head in heads:
        table.add_column(head, justify="right")
    total = ledger.total

    def row(name: str, account) -> tuple[str, ...]:
        vanilla = account.images * vanilla_flops_per_image
        return (
            name,
            f"{account.steps:,}",
            f"{account.images:,}",
            f"{account.decoded_images:,}",
            f"{account.images / account.seconds if account.seconds else 0:,.0f}",
            f"{account.seconds:,.1f}",
            f"{account.data_wait:.0%}",
            f"{account.flops:.2e}",
            f"{account.flops / total.flops if total.flops else 0:.0%}",
            f"{vanilla:.2e}",
            f"{vanilla / account.flops if account.flops else 0:.2f}×",
        )

    for stage, account in zip(curriculum.stages, ledger.stages, strict=True):
        table.add_row(*row(show_size(stage.size_px), account))
    table.add_section()
    table.add_row(*row("total", total))
    return table

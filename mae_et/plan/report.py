"""What a configuration will cost, before anything is trained: the `plan` command, and its estimate for a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from ..console import WideTable
from .build import as_vanilla, build_curriculum, shape_of
from .config import PretrainConfig
from .cost import encoder_flops_per_image
from .curriculum import Curriculum, Stage
from .flags import NOT_NEGATIVE, POSITIVE, RUN, SHARE_ABOVE_0, from_recipe
from .gpu import GpuStep
from .shapes import show_size


@dataclass(frozen=True)
class EstimateFlags:
    group: ClassVar[str] = "plan"

    vs: Annotated[str, RUN] = ""
    """Recipe to compare with; default: the same configuration as vanilla MAE."""
    finetune_epochs: Annotated[float, RUN, NOT_NEGATIVE] = 100
    """Epochs of fine-tuning to estimate; MAE takes 100 for ViT-B, 50 for ViT-L and ViT-H."""
    json: Annotated[bool, RUN] = False
    """Machine-readable output."""
    devices: Annotated[int | None, RUN, POSITIVE] = None
    """Devices to plan for; default: world_size."""
    device_flops: Annotated[float | None, RUN, POSITIVE] = None
    """Peak FLOP/s of a device; with it, hours are predicted."""
    utilisation: Annotated[float | None, RUN, SHARE_ABOVE_0] = None
    """Share of the peak that training achieves; default: an estimate for each stage."""
    link: Annotated[float | None, RUN, POSITIVE] = None
    """Bytes a second from a device to the next, for the gradients' all-reduce; default: as if it were free."""
    images_per_second: Annotated[float | None, RUN, POSITIVE] = None
    """Images a second that the loaders of a device deliver; default: as if they were always there."""


@dataclass(frozen=True)
class PlanConfig(EstimateFlags, PretrainConfig):
    """Print what a configuration will cost, before any training: all flags of pretraining, and these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("utilisation", "link", "images_per_second"):
            if getattr(self, name) and not self.device_flops:
                raise ValueError(f"--{name} predicts hours only together with --device_flops")


def plan_report(config: PlanConfig, count_images: Callable[[PretrainConfig], int]) -> dict[str, Any]:
    """What `plan` prints, as plain values. FLOPs are training FLOPs: forward, backward and input operators.

    count_images: images in a configuration's data set, or what it says where the data are not at hand.
    """
    other = as_vanilla(config)
    if config.vs:  # on the same images
        images = {name: getattr(config, name) for name in ("data_path", "num_images", "holdout")}
        other = replace(from_recipe(PretrainConfig, config.vs, "--vs"), **images)
    devices = config.devices or config.world_size
    plan, against = (build_curriculum(c, count_images(c), devices) for c in (config, other))
    shape = shape_of(config)
    steps = [GpuStep.of(config, plan, stage, devices) for stage in plan.stages]
    # Forward and backward of the encoder on all patches of all images, at full size; the head is too small to count.
    finetune = 3 * encoder_flops_per_image(shape, shape.num_patches) * config.finetune_epochs * plan.num_images
    return {
        "recipe": config.recipe or config.curriculum,
        "stages": [
            {
                "size_px": stage.size_px,
                "patches": stage.patches,
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
                "gflops_per_device_step": (stage.batch_size / devices * stage.flops_per_image + stage.update_flops)
                / 1e9,
                "micro_batches": step.micro_batches,
                "launches": step.micro_batches * step.launches + step.update_launches,
                "peak_memory_bytes": step.peak_memory_bytes,
            }
            for stage, step in zip(plan.stages, steps, strict=True)
        ],
        "totals": _totals(plan) | {"remainder_images": plan.remainder_images},
        "skipped_flops": config.start_epoch / config.epochs * plan.total_flops,
        "finetune": {"epochs": config.finetune_epochs, "flops": finetune},
        "vs": {
            "recipe": config.vs or "the same as vanilla MAE",
            "totals": _totals(against),
            "speedup_flops": against.total_flops / plan.total_flops,
            # How much the same number of images would have cost at the other plan's cost per image.
            "flops_same_images": plan.total_images * against.total_flops / against.total_images,
        },
        **_scaling(config, plan, other, against, devices),
    }


def _scaling(
    config: PlanConfig, plan: Curriculum, other: PretrainConfig, against: Curriculum, devices: int
) -> dict[str, Any]:
    """{"scaling": …} where the devices are described."""
    if not config.device_flops:
        return {}
    cluster = Cluster(devices, config.device_flops, config.utilisation, config.link, config.images_per_second)
    ours, theirs = (
        scaling_report(
            curriculum,
            shape_of(flags).num_parameters,
            cluster,
            [GpuStep.of(flags, curriculum, stage, devices) for stage in curriculum.stages],
        )
        for flags, curriculum in ((config, plan), (other, against))
    )
    equal = theirs["hours"] * plan.total_flops / against.total_flops
    return {"scaling": ours | {"hours_over_vs_at_equal_flops": ours["hours"] / equal}}


def _totals(plan: Curriculum) -> dict[str, float]:
    return {
        "flops": plan.total_flops,
        "images": plan.total_images,
        "update_share": plan.update_share,
        "decoded_images": plan.decoded_images,
        "passes": plan.total_images / plan.num_images,
        "steps": plan.total_steps,
    }


def plan_table(report: dict[str, Any]) -> WideTable:
    """The stages of a :func:`plan_report` as a table."""
    heads = ("size", "patches", "visible", "predicted", "batch", "passes", "steps", "images", "GFLOPs", "compute")
    rows = [
        (
            show_size(row["size_px"]),
            *(f"{row[key]:,}" for key in ("patches", "num_visible", "num_predicted", "batch_size")),
            f"{row['passes']:.1f}",
            f"{row['steps']:,}",
            f"{row['images']:,}",
            f"{row['gflops_per_image']:.3g}",
            f"{row['compute_share']:.1%}",
            f"{row['images_per_device']:,.0f}",
            f"{row['gflops_per_device_step'] / 1e3:.3g}",
            f"{row['peak_memory_bytes'] / 2**30:.1f}" if row["peak_memory_bytes"] else "",
        )
        for row in report["stages"]
    ]
    total = report["totals"]
    sums = f"{total['passes']:.1f}", f"{total['steps']:,}", f"{total['images']:,}"
    last = ("total", "", "", "", "", *sums, "", "100%", "", "", "")
    return WideTable(f"Plan of {report['recipe']}", (*heads, "per device", "TFLOPs/step", "peak GiB"), rows, last)


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
    updates = []
    if total["update_share"]:
        updates.append(f"{total['update_share']:.1%} of them are updates; the larger the batch, the fewer there are")
    if report["skipped_flops"]:
        updates.append(f"about {report['skipped_flops']:.3e} of them are skipped by --start_epoch")
    scaling = []
    if "scaling" in report:
        slower = report["scaling"]["hours_over_vs_at_equal_flops"]
        scaling.append(f"{slower:.2f}× the time that the same FLOPs take with {vs['recipe']}")
    return [
        *decoded,
        f"{total['flops']:.3e} training FLOPs; whole steps leave {total['remainder_images']:+.0f} images over",
        *updates,
        f"{vs['recipe']}: {vs['totals']['flops']:.3e} FLOPs for {vs['totals']['passes']:.1f} passes, "
        f"{vs['speedup_flops']:.2f}× the cost of this plan",
        f"fine-tuning for {finetune['epochs']:g} epochs at full size: {finetune['flops']:.3e} FLOPs, "
        f"{finetune['flops'] / total['flops']:.2f}× this plan",
        f"the same {total['images']:,} images there: {vs['flops_same_images']:.3e} FLOPs, "
        f"{vs['flops_same_images'] / total['flops']:.2f}×",
        *scaling,
    ]


# ── estimate for a cluster ──
#
# A step takes as long as the slowest of four things that overlap: the devices' kernels; the hosts, who ask for one
# kernel after the other; the ring all-reduce of the gradients, once per step, which DDP overlaps with the backward
# pass; and the loaders. What doesn't overlap comes on top.

GRADIENT_BYTES = 4
"""Per parameter: gradients are float32 in either precision."""


@dataclass(frozen=True)
class Cluster:
    """Devices, and what lies between them."""

    devices: int
    device_flops: float
    """Peak FLOP/s of one device in the precision of the run."""
    utilisation: float | None
    """Share of it that training achieves; None: as estimated for each stage."""
    link: float | None = None
    """Bytes a second that a device can send to the next one in the ring; None: communication costs nothing."""
    images_per_second: float | None = None
    """Images a second that the loaders of one device deliver; None: data are always there."""

    def all_reduce_seconds(self, size_bytes: float) -> float:
        """Of a ring: each device sends and receives 2·(N − 1)/N of the bytes (Patarasuk & Yuan, 2009)."""
        return 2 * (self.devices - 1) / self.devices * size_bytes / self.link if self.link else 0.0

    def seconds_per_step(self, stage: Stage, parameters: int, step: GpuStep | None = None) -> dict[str, float]:
        """Seconds of one step by what takes them: compute, host, link, data. step: else nothing is known of hosts."""
        images = stage.batch_size / self.devices
        share = self.utilisation
        if share is None:
            assert step is not None  # whose estimate it is
            share = step.utilisation(self.device_flops)
        return {
            "compute": (images * stage.flops_per_image + stage.update_flops) / (self.device_flops * share),
            "host": step.host_seconds if step else 0.0,
            "link": self.all_reduce_seconds(GRADIENT_BYTES * parameters),
            "data": images / self.images_per_second if self.images_per_second else 0.0,
        }


def scaling_report(
    plan: Curriculum, parameters: int, cluster: Cluster, steps: Sequence[GpuStep] = ()
) -> dict[str, Any]:
    """Predicted hours per stage and in total, as plain values. parameters: those that are trained."""
    rows: list[dict[str, Any]] = []
    known: Sequence[GpuStep | None] = steps or [None] * len(plan.stages)
    for stage, step in zip(plan.stages, known, strict=True):
        seconds = cluster.seconds_per_step(stage, parameters, step)
        bound = max(seconds, key=seconds.__getitem__)
        without_data = max(value for name, value in seconds.items() if name != "data")
        flops = stage.batch_size / cluster.devices * stage.flops_per_image + stage.update_flops
        rows.append(
            {
                "size_px": stage.size_px,
                **{f"{name}_seconds": value for name, value in seconds.items()},
                "bound": bound,
                "mfu": flops / cluster.device_flops / seconds[bound],
                "hours": stage.steps * seconds[bound] / 3600,
                # What the loaders of one device must deliver so as never to be waited for.
                "images_per_second_needed": stage.batch_size / cluster.devices / without_data,
            }
        )
    hours = sum(row["hours"] for row in rows)
    return {
        "devices": cluster.devices,
        "device_flops": cluster.device_flops,
        "utilisation": cluster.utilisation,
        "mfu": plan.total_flops / cluster.devices / cluster.device_flops / (3600 * hours),
        "link": cluster.link,
        "images_per_second": cluster.images_per_second,
        "gradient_bytes": GRADIENT_BYTES * parameters,
        "stages": rows,
        "hours": hours,
    }


def scaling_table(report: dict[str, Any]) -> WideTable:
    """A :func:`scaling_report` as a table."""
    title = f"On {report['devices']} device(s) of {report['device_flops']:.3g} FLOP/s, {report['mfu']:.0%} used"
    names = "compute", "host", "link", "data"
    heads = "size", *(f"{name} s/step" for name in names), "bound by", "MFU", "images/s per device", "hours"
    rows: list[tuple[str, ...]] = []
    for row in report["stages"]:
        seconds = (f"{row[f'{name}_seconds']:.4f}" for name in names)
        found = row["bound"], f"{row['mfu']:.0%}", f"{row['images_per_second_needed']:,.0f}", f"{row['hours']:,.2f}"
        rows.append((show_size(row["size_px"]), *seconds, *found))
    total = "total", *[""] * 5, f"{report['mfu']:.0%}", "", f"{report['hours']:,.2f}"
    return WideTable(title, heads, rows, total)

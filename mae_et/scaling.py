"""Training time on paper: what a plan takes on so many devices, and what bounds each of its stages.

A step takes as long as the slowest of three things, which go on side by side: the devices' arithmetic; the ring
all-reduce of the gradients, once per step however many micro-batches there are, which DDP overlaps with the backward
pass; and the loaders. That is the best a cluster can do: what doesn't overlap comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .curriculum import Curriculum, Stage, show_size

GRADIENT_BYTES = 4
"""Per parameter: gradients are float32 in either precision."""


@dataclass(frozen=True)
class Cluster:
    """Devices, and what lies between them."""

    devices: int
    device_flops: float
    """Peak FLOP/s of one device in the precision of the run."""
    utilisation: float
    """Share of it that training achieves."""
    link: float | None = None
    """Bytes a second that a device can send to the next one in the ring; None: communication costs nothing."""
    images_per_second: float | None = None
    """Images a second that the loaders of one device deliver; None: data are always there."""

    def all_reduce_seconds(self, size_bytes: float) -> float:
        """Of a ring: each device sends and receives 2·(N − 1)/N of the bytes (Patarasuk & Yuan, 2009)."""
        return 2 * (self.devices - 1) / self.devices * size_bytes / self.link if self.link else 0.0

    def seconds_per_step(self, stage: Stage, parameters: int) -> dict[str, float]:
        """Seconds of one step by what takes them: compute, link, data."""
        images = stage.batch_size / self.devices
        return {
            "compute": images * stage.flops_per_image / (self.device_flops * self.utilisation),
            "link": self.all_reduce_seconds(GRADIENT_BYTES * parameters),
            "data": images / self.images_per_second if self.images_per_second else 0.0,
        }


def scaling_report(plan: Curriculum, parameters: int, cluster: Cluster) -> dict[str, Any]:
    """Predicted hours per stage and in total, as plain values. parameters: those that are trained."""
    rows = []
    for stage in plan.stages:
        seconds = cluster.seconds_per_step(stage, parameters)
        bound = max(seconds, key=seconds.__getitem__)
        without_data = max(seconds["compute"], seconds["link"])
        rows.append(
            {
                "size_px": stage.size_px,
                **{f"{name}_seconds": value for name, value in seconds.items()},
                "bound": bound,
                "hours": stage.steps * seconds[bound] / 3600,
                # What the loaders of one device must deliver so as never to be waited for.
                "images_per_second_needed": stage.batch_size / cluster.devices / without_data,
            }
        )
    return {
        "devices": cluster.devices,
        "device_flops": cluster.device_flops,
        "utilisation": cluster.utilisation,
        "link": cluster.link,
        "images_per_second": cluster.images_per_second,
        "gradient_bytes": GRADIENT_BYTES * parameters,
        "stages": rows,
        "hours": sum(row["hours"] for row in rows),
    }


def scaling_table(report: dict[str, Any]) -> Table:
    """A :func:`scaling_report` as a table."""
    title = f"On {report['devices']} device(s) of {report['device_flops']:.3g} FLOP/s, {report['utilisation']:.0%} used"
    table = Table(title=title, title_justify="left")
    for head in ("size", "compute s/step", "link s/step", "data s/step", "bound by", "images/s per device", "hours"):
        table.add_column(head, justify="right")
    for row in report["stages"]:
        seconds = (f"{row[f'{name}_seconds']:.4f}" for name in ("compute", "link", "data"))
        needed = f"{row['images_per_second_needed']:,.0f}"
        table.add_row(show_size(row["size_px"]), *seconds, row["bound"], needed, f"{row['hours']:,.2f}")
    table.add_section()
    table.add_row("total", "", "", "", "", "", f"{report['hours']:,.2f}")
    return table

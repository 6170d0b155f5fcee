"""Figures of a comparison in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

AXIS_LABELS = {"flops": "training FLOPs", "seconds": "training seconds"}
ONLINE = {
    "knn_cls": "online kNN, class token",
    "knn_mean": "online kNN, mean of patches",
    "rankme_cls": "RankMe, class token",
    "rankme_mean": "RankMe, mean of patches",
}
"""Online quality in metrics.jsonl (--probe_every)."""


def number(value: float | None, digits: int = 3) -> str:
    """1.27e+13 and 0.0123 as people write them; – for nothing."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def spread(summary: Mapping[str, Any] | None, show: Callable[[float], str] = lambda v: f"{v:.2f}") -> str:
    """81.20 ± 0.15, without the spread for one seed."""
    if summary is None:
        return "–"
    return show(summary["mean"]) + (f" ± {show(summary['std'])}" if summary["std"] is not None else "")


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f}"


def answer_compute(row: Mapping[str, Any]) -> str:
    """+0.83 [0.41, 1.20], or why there is no answer."""
    if row["difference"] is None:
        return "outside the baseline's arms"
    return f"{row['difference']:+.2f}" + interval(row["interval"], "+.2f")


def answer_quality(row: Mapping[str, Any]) -> str:
    """1.93× [1.41, 2.60], or that the baseline has it already, or never."""
    if row["status"] == "no baseline":
        return "not evaluated"
    if row["status"] == "below":
        return f"less than {row['shortest'] / row['cost']:.2f}×: its shortest arm has it" + interval(
            row["interval"], ".2f"
        )
    if row["status"] == "not reached":
        return f"not reached within {row['longest'] / row['cost']:.2f}×" + interval(row["interval"], ".2f")
    return f"{row['ratio']:.2f}×" + interval(row["interval"], ".2f")


def interval(ends: Sequence[float | None] | None, form: str) -> str:
    """[0.41, 1.20]; … for an end outside the baseline's arms; nothing without repeated seeds, or with both outside."""
    if ends is None or not any(ends):
        return ""
    return f" [{', '.join('…' if end is None else format(end, form) for end in ends)}]"


def online_names(report: Mapping[str, Any]) -> list[str]:
    """Online qualities to show: kNN where images have labels, else RankMe."""
    found = {name for arm in report["arms"] for name in arm["online"]}
    kind = "knn" if "knn_mean" in found else "rankme"
    return [name for name in ONLINE if name in found and name.startswith(kind)]

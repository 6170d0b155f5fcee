"""A comparison in words: its verdict in sentences, its figures as people write them, captions."""

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
NOT_RANKED = {
    "wide spread": "they spread too widely over seeds, see below",
    "different devices": "its runs and the baseline's were not timed on the same device or not in one pass",
}
"""Why arms are not ranked by seconds: the words of a table, and of a sentence."""


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
    """+0.83 [0.41, 1.20], the same against an arm that costs more, or why there is no answer."""
    if why := _no_answer(row):
        return why
    if nearest := row["nearest"]:
        return f"{_difference(nearest)} against {nearest['factor']:.2f}× the cost"
    return "outside the baseline's arms" if row["difference"] is None else _difference(row)


def _difference(answer: Mapping[str, Any]) -> str:
    return f"{answer['difference']:+.2f}" + interval(answer["interval"], "+.2f")


def answer_quality(row: Mapping[str, Any]) -> str:
    """1.93× [1.41, 2.60], or that the baseline has it already, or never."""
    if why := _no_answer(row):
        return why
    if row["status"] == "below":
        return f"less than {row['shortest'] / row['cost']:.2f}×: its shortest arm has it" + interval(
            row["interval"], ".2f"
        )
    if row["status"] == "not reached":
        return f"not reached within {row['longest'] / row['cost']:.2f}×" + interval(row["interval"], ".2f")
    return f"{row['ratio']:.2f}×" + interval(row["interval"], ".2f")


def _no_answer(row: Mapping[str, Any]) -> str:
    """Why neither answer is given, if so."""
    if not row["baseline_n"]:
        return "baseline not evaluated"
    return f"not ranked: {row['not_ranked']}" if row["not_ranked"] else ""


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


# ── the verdict ──


def verdict(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The answer first: for each arm, a head and sentences on equal FLOPs, equal seconds and equal quality."""
    arms = list(dict.fromkeys(row["arm"] for row in report["equal_compute"]))
    if not arms:
        why = "There is no arm beside the baseline." if report["protocols"] else "No run has been evaluated."
        return [("No verdict", [why])]
    answers, general = [], []
    curves = [row for row in report["equal_quality"] if row["baseline_n"]]
    one_length = bool(curves) and all(row["shortest"] == row["longest"] for row in curves)
    for arm in arms:
        sentences = []
        for axis in AXIS_LABELS:
            costs, needs = (
                [row for row in report[answer] if row["arm"] == arm and row["axis"] == axis]
                for answer in ("equal_compute", "equal_quality")
            )
            if costs[0]["not_ranked"]:
                continue
            sentences.append(_at_equal_cost(costs, axis))
            needs = [row for row in needs if row["baseline_n"]]
            if needs and not one_length:
                sentences.append(_for_equal_quality(needs, axis))
        at_flops = [row for row in report["equal_compute"] if row["arm"] == arm and row["axis"] == "flops"]
        answers.append((f"{arm} ({_seeds(at_flops)})", sentences))
    for why, because in NOT_RANKED.items():
        rows = [row for row in report["equal_compute"] if row["not_ranked"] == why]
        if unranked := list(dict.fromkeys(row["arm"] for row in rows)):
            which = "No arm" if unranked == arms else f"Not every arm (left out: {', '.join(unranked)})"
            general.append(f"{which} is ranked by seconds: {because}.")
    if one_length:
        has = "has" if len(report["baseline"]) == 1 else "is evaluated at"
        general.append(f"For equal quality there is no answer: the baseline {has} one length only.")
    return [*answers, *([("All arms", general)] if general else [])]


def _seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """n = 3, of each baseline arm 3; and in which evaluations, where they differ."""
    told: dict[str, list[str]] = {}
    for row in rows:
        baseline = f"of each baseline arm {row['baseline_n']}" if row["baseline_n"] else "of the baseline none"
        told.setdefault(f"n = {row['n']}, {baseline}", []).append(row["protocol"])
    return next(iter(told)) if len(told) == 1 else _listed({f"{n} in": where for n, where in told.items()})


def _at_equal_cost(rows: Sequence[Mapping[str, Any]], axis: str) -> str:
    """At equal FLOPs: ahead in knn by +0.83 [+0.41, +1.20]; no difference that 3 seeds can tell in …"""
    told: dict[str, list[str]] = {}
    for row in rows:
        if not row["baseline_n"]:
            what = "the baseline is not evaluated in"
        elif nearest := row["nearest"]:
            than = (
                "ahead even of the baseline's shortest"
                if nearest["difference"] > 0
                else "behind even the baseline's longest"
            )
            what = f"{than} arm, with {nearest['factor']:.2f}× as many, in"
        elif row["difference"] is None:
            what = "no answer, since its cost lies outside the baseline's arms, in"
        elif row["interval"] is None:
            what = "one seed, so nothing is sure, in"
        elif row["interval"][0] > 0:
            what = "ahead in"
        elif row["interval"][1] < 0:
            what = "behind in"
        else:
            what = f"no difference that {min(row['n'], row['baseline_n'])} seeds can tell in"
        answer = row["nearest"] or row
        value = "" if answer["difference"] is None else f" ({_difference(answer)})"
        told.setdefault(what, []).append(row["protocol"] + value)
    return f"At equal {AXIS_LABELS[axis].removeprefix('training ')}: {_listed(told)}."


def _for_equal_quality(rows: Sequence[Mapping[str, Any]], axis: str) -> str:
    """For the same quality the baseline needs 1.93× [1.41, 2.60] the FLOPs in knn; …"""
    told: dict[str, list[str]] = {}
    for row in rows:
        ends, protocol = interval(row["interval"], ".2f"), row["protocol"]
        if row["interval"] is not None and not row["told_apart"]:
            what = f"no difference that {min(row['n'], row['baseline_n'])} seeds can tell in"
            where = f"{protocol} ({answer_quality(row)})"
        elif row["status"] == "reached":
            what, where = "the baseline needs", f"{row['ratio']:.2f}×{ends} as many in {protocol}"
        elif row["status"] == "not reached":
            factor = row["longest"] / row["cost"]
            what, where = f"the baseline does not reach it with {factor:.2f}× as many in", protocol + ends
        else:
            what, where = "the baseline's shortest arm has it already in", protocol + ends
        told.setdefault(what, []).append(where)
    label = AXIS_LABELS[axis].removeprefix("training ")
    return f"{label[0].upper()}{label[1:]} for equal quality: {_listed(told)}."


def _listed(told: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{what} {', '.join(things)}" for what, things in told.items())


def wide_note(report: Mapping[str, Any]) -> list[str]:
    """Why arms are not ranked by seconds, if any is not."""
    wide = report["wide_seconds"]
    if not wide:
        return []
    arms = ", ".join(f"{name} ({share:.0%})" for name, share in wide.items())
    return [
        f"Seconds of these arms spread widely over seeds (standard deviation over mean): {arms}. They are not ranked "
        "by seconds, nor is any arm where the baseline is among them: time them again in "
        "one pass on a quiet machine, see benchmarks/quiet_pass.py."
    ]


def captions(report: Mapping[str, Any]) -> dict[str, str]:
    """Caption of each picture, by name: first those of quality against cost."""
    found = {
        f"{protocol}-{axis}": f"{protocol}: top-1 against {label}. Lines join arms that differ only in length; dots "
        "are seeds."
        for axis, label in AXIS_LABELS.items()
        for protocol in report["protocols"]
    }
    if any(arm["loss"] for arm in report["arms"]):
        found["loss"] = (
            "Training loss against the share of the compute, each stage at its own size, so not on one scale."
        )
    for name in online_names(report):
        found[f"online-{name}"] = (
            f"{ONLINE[name]}, of held-out training images while each run trained, against training FLOPs."
        )
    for axis, label in AXIS_LABELS.items():
        found[f"stages-{axis}"] = f"{label[0].upper()}{label[1:]} of every arm, by stage."
    return found


def opening(report: Mapping[str, Any]) -> list[str]:
    """Pictures that stand beside the verdict: quality against FLOPs."""
    return [f"{protocol}-flops" for protocol in report["protocols"]]

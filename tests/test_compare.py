"""Comparing run folders: statistics against numpy and by hand, archives, corrupt files, and the command end to end."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from run_folders import evaluate_again, write_run, write_untrained

from mae_et.cli import main
from mae_et.compare import runs
from mae_et.compare.answers import interpolate, needed
from mae_et.compare.compare import CompareConfig, compare
from mae_et.compare.figures import draw_figures
from mae_et.compare.report import markdown, write_report
from mae_et.compare.words import answer_compute, answer_quality, captions, number, verdict
from mae_et.evaluate.config import FinetuneConfig
from mae_et.plan.flags import to_dict

ROOT = Path(__file__).parent.parent


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Vanilla at three lengths and a curriculum at one, three seeds each."""
    for seed in range(3):
        for t, top1 in ((1, 70.0), (2, 80.0), (4, 84.0)):
            write_run(tmp_path / f"vanilla-{t}-seed{seed}", seed, t * 1e12, top1 + seed - 1, 100.0 * t, epochs=4 * t)
        write_run(
            tmp_path / f"et_pp-seed{seed}",
            seed,
            *(1e12, 82.0 + (seed - 1) / 10, 125.0),
            curriculum="et_pp",
            stage_sizes=[16, 32],
        )
    return tmp_path


def change(path: Path, part: str = "", **values) -> None:
    """Change a file of JSON, or a part of it, of a list the first record."""
    content = json.loads(path.read_text())
    changed = content[part] if part else content
    (changed[0] if isinstance(changed, list) else changed).update(values)
    path.write_text(json.dumps(content))


def row(report: dict, answer: str, axis: str) -> dict:
    return next(r for r in report[answer] if r["axis"] == axis)


def test_both_answers_by_hand(study):
    report = compare(CompareConfig((str(study),)))
    assert report["baseline"] == ["vanilla-1", "vanilla-2", "vanilla-4"]
    assert [arm["n"] for arm in report["arms"]] == [3, 3, 3, 3]
    at_flops = row(report, "equal_compute", "flops")
    assert at_flops["difference"] == pytest.approx(12.0)
    at_seconds = row(report, "equal_compute", "seconds")
    assert at_seconds["difference"] == pytest.approx(82 - (70 + 10 * math.log(1.25, 2)))
    needs = row(report, "equal_quality", "flops")
    assert needs["status"] == "reached" and needs["ratio"] == pytest.approx(2 * 2**0.5)  # halfway from 80 to 84
    low, high = needs["interval"]
    assert low < needs["ratio"] < high
    assert row(report, "equal_quality", "seconds")["ratio"] == pytest.approx(2 * 2**0.5 * 100 / 125)


def test_a_single_run_of_another_length_takes_no_interval_away(study):
    """And at one cost the baseline's best arm is what has to be beaten."""
    before = compare(CompareConfig((str(study),)))
    write_run(study / "vanilla-8-seed0", 0, 8e12, 86.0, 800.0, epochs=32)
    write_run(study / "vanilla-hold-seed0", 0, 1.001e12, 60.0, 100.0, epochs=4, hold_epochs=2)
    after = compare(CompareConfig((str(study),)))
    assert after["baseline"] == ["vanilla-1", "vanilla-hold", "vanilla-2", "vanilla-4", "vanilla-8"]
    for answer in ("equal_compute", "equal_quality"):
        assert row(after, answer, "flops") == row(before, answer, "flops")
    write_run(study / "et_pp-2-seed0", 0, 1e12, 65.0, 125.0, curriculum="et_pp", stage_sizes=[16, 32], epochs=2)
    below = [r for r in compare(CompareConfig((str(study),)))["equal_quality"] if r["arm"] == "et_pp-2"]
    assert (below[0]["status"], below[0]["baseline_n"]) == ("below", 1), "vanilla-8 makes the curve longer"
    (study / "vanilla-8-seed0/eval-knn.json").rename(study / "unread")
    below = [r for r in compare(CompareConfig((str(study),)))["equal_quality"] if r["arm"] == "et_pp-2"]
    assert (below[0]["status"], below[0]["baseline_n"]) == ("below", 3)
    for name in ("vanilla-8-seed0", "et_pp-2-seed0"):
        shutil.rmtree(study / name)
    for seed in (1, 2):
        write_run(study / f"vanilla-hold-seed{seed}", seed, 1.001e12, 60.0 + seed, 100.0, epochs=4, hold_epochs=2)
    assert row(compare(CompareConfig((str(study),))), "equal_compute", "flops") == row(before, "equal_compute", "flops")
    for seed in range(3):
        result = study / f"vanilla-hold-seed{seed}" / "eval-knn.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"top1": 75.0 + seed}))
    better = row(compare(CompareConfig((str(study),))), "equal_compute", "flops")
    assert better["difference"] == pytest.approx(82.0 - 76.0, abs=0.01) and better["interval"]
    write_run(study / "vanilla-8-seed0", 0, 8e12, 86.0, 800.0, epochs=32)
    write_run(study / "et-seed0", 0, 8e12, 88.0, 800.0, curriculum="et", stage_sizes=[16, 32])
    single = [r for r in compare(CompareConfig((str(study),)))["equal_compute"] if r["arm"] == "et"]
    assert {(r["axis"], r["baseline_n"]) for r in single} == {("flops", 1), ("seconds", 1)}
    assert single[0]["difference"] == pytest.approx(2.0)


def test_seeds_are_counted_of_the_arms_that_decide(study):
    """Of the curve's others one has two, and no say at equal cost."""
    for seed, flops in ((0, 8e12), (1, 8e12), (0, 16e12), (1, 16e12), (2, 16e12)):
        write_run(study / f"vanilla-{flops:g}-seed{seed}", seed, flops, 86.0, 800.0, epochs=flops / 2.5e11)
    wanted = {"et_pp": 3, "as-4": 3, "3": 3, "5": 2, "12": 2}
    for name, trillions in (("as-4", 4.02), ("3", 3), ("5", 5), ("12", 12)):
        changes = {"curriculum": "et_pp", "stage_sizes": [16, 32], "epochs": trillions}
        write_run(study / f"{name}-seed0", 0, trillions * 1e12, 82.0, 100.0, **changes)
    rows = [r for r in compare(CompareConfig((str(study),)))["equal_compute"] if r["axis"] == "flops"]
    assert {r["arm"]: r["baseline_n"] for r in rows} == wanted


def test_arms_are_mean_and_sample_deviation(study):
    arm = next(a for a in compare(CompareConfig((str(study),)))["arms"] if a["name"] == "vanilla-2")
    quality = arm["quality"]["knn"]
    assert (quality["mean"], quality["std"]) == pytest.approx((80.0, np.std([79, 80, 81], ddof=1)))
    assert arm["seconds"]["mean"] == pytest.approx(200) and arm["data_wait"]["mean"] == pytest.approx(0.1)
    assert arm["passes"] == pytest.approx(0.64)


def test_stages_add_up_and_are_measured_against_the_baseline(study):
    arm = next(a for a in compare(CompareConfig((str(study),)))["arms"] if a["name"] == "et_pp")
    assert [stage["size_px"] for stage in arm["stages"]] == ["16", "32"]
    assert sum(stage["flops_share"] for stage in arm["stages"]) == pytest.approx(1)
    for stage in arm["stages"]:
        # the baseline: 7e12 FLOPs and 700 s for 3·640 images; a stage: 5e11 FLOPs and 62.5 s for 640
        assert stage["speedup_flops"] == pytest.approx(7e12 / 1920 / (5e11 / 640))
        assert stage["seconds_per_flop"] == pytest.approx((700 / 1920 / (62.5 / 640)) / (7e12 / 1920 / (5e11 / 640)))


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    write_run(tmp_path / "a", top1=70.0)
    write_run(tmp_path / "b", flops=4e12, top1=90.0, epochs=8)
    write_run(tmp_path / "c", flops=2e12, top1=80.5, curriculum="et", stage_sizes=[16, 32])
    report = compare(CompareConfig((str(tmp_path),)))
    assert row(report, "equal_compute", "flops")["interval"] is None
    assert row(report, "equal_compute", "flops")["difference"] == pytest.approx(0.5)
    assert any("one seed only" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("top1", "status", "words"),
    [(60.0, "below", "shortest arm has it"), (99.0, "not reached", "not reached within 4.00×")],
)
def test_a_quality_outside_the_baseline_is_said_never_extrapolated(tmp_path, top1, status, words):
    write_run(tmp_path / "a", top1=70.0)
    write_run(tmp_path / "b", flops=4e12, top1=90.0, epochs=8)
    write_run(tmp_path / "c", top1=top1, curriculum="et", stage_sizes=[16, 32])
    found = row(compare(CompareConfig((str(tmp_path),))), "equal_quality", "flops")
    assert (found["status"], found["ratio"]) == (status, None)
    assert words in answer_quality(found)


@pytest.mark.parametrize("flops", [1e11, 9e12])
def test_a_cost_outside_the_baseline_has_no_answer(tmp_path, flops):
    write_run(tmp_path / "a")
    write_run(tmp_path / "c", flops=flops, curriculum="et", stage_sizes=[16, 32])
    found = row(compare(CompareConfig((str(tmp_path),))), "equal_compute", "flops")
    assert found["difference"] is None and "outside" in answer_compute(found)


@pytest.mark.parametrize(
    ("cost", "top1", "difference", "factor", "words"),
    [
        (50.0, 82.0, 12.0, 2.0, "ahead even of the baseline's shortest arm, with 2.00× as many, in knn (+12.00 ["),
        (800.0, 75.0, -9.0, 0.5, "behind even the baseline's longest arm, with 0.50× as many, in knn (-9.00 ["),
        (50.0, 65.0, None, None, "no answer, since its cost lies outside the baseline's arms, in knn."),
        (
            50.0,
            70.5,
            None,
            None,
            "no answer, since its cost lies outside the baseline's arms, in knn.",
        ),  # within spread
        (800.0, 90.0, None, None, "no answer, since its cost lies outside the baseline's arms, in knn."),
    ],
)
def test_ahead_with_less_and_behind_with_more_than_any_arm_of_the_baseline(
    study, cost, top1, difference, factor, words
):
    for seed in range(3):
        where = study / f"et-seed{seed}"
        write_run(where, seed, 2e12, top1 + seed - 1, cost, curriculum="et", stage_sizes=[16, 32])
    report = compare(CompareConfig((str(study),)))
    found = next(r for r in report["equal_compute"] if r["arm"] == "et" and r["axis"] == "seconds")
    assert found["difference"] is found["interval"] is None, "it is not at equal cost"
    assert f"At equal seconds: {words}" in said(report, "et (")
    if difference is None:
        assert found["nearest"] is None and answer_compute(found) == "outside the baseline's arms"
    else:
        low, high = found["nearest"]["interval"]
        assert (found["nearest"]["difference"], found["nearest"]["factor"]) == pytest.approx((difference, factor))
        assert low < difference < high and low * high > 0
        assert answer_compute(found) == f"{difference:+.2f} [{low:+.2f}, {high:+.2f}] against {factor:.2f}× the cost"


@given(
    st.lists(st.tuples(st.floats(0.1, 1.0), st.floats(0.01, 10)), min_size=1, max_size=5),
    st.floats(0.001, 0.999),
)
def test_needed_undoes_interpolate_on_rising_curves(steps, share):
    costs = [1.0, *(1 + np.cumsum([cost for cost, _ in steps])).tolist()]
    qualities = [0.0, *np.cumsum([quality for _, quality in steps]).tolist()]
    quality = share * qualities[-1]
    assert interpolate(costs, qualities, needed(costs, qualities, quality)) == pytest.approx(quality, abs=1e-9)


def test_a_stage_that_was_skipped_is_left_out(tmp_path):
    write_run(tmp_path / "a")
    run = write_run(tmp_path / "b", curriculum="et", stage_sizes=[16, 32])
    ledger = json.loads((run / "ledger.json").read_text())
    for name in ("steps", "images", "flops", "train_seconds", "data_seconds"):
        ledger["stages"][0][name] = 0
    (run / "ledger.json").write_text(json.dumps(ledger))
    report = compare(CompareConfig((str(tmp_path),)))
    arm = next(arm for arm in report["arms"] if arm["name"] == "b")
    assert [stage["size_px"] for stage in arm["stages"]] == ["32"]


def test_other_machines_are_a_warning(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", curriculum="et", stage_sizes=[16, 32], environment={"device": "cuda (H100), bf16"})
    warnings = compare(CompareConfig((str(tmp_path),)))["warnings"]
    assert any("different machines" in warning and "H100" in warning for warning in warnings)


def test_from_scratch_costs_nothing_and_is_no_baseline(study):
    scratch = study / "scratch-seed0"
    scratch.mkdir()
    config = to_dict(FinetuneConfig(like=str(study / "vanilla-1-seed0")))
    (scratch / "config.yaml").write_text(yaml.safe_dump(config))
    (scratch / "environment.json").write_text("{}")
    result = json.loads((study / "et_pp-seed0" / "eval-knn.json").read_text())
    (scratch / "eval-knn.json").write_text(json.dumps(result))
    report = compare(CompareConfig((str(study),)))
    first = report["arms"][0]
    assert (first["name"], first["flops"], first["stages"]) == ("from scratch", 0.0, [])
    assert {r["arm"] for r in report["equal_compute"]} == {"et_pp"}


def test_the_baseline_may_be_named(study):
    report = compare(CompareConfig((str(study),), baseline=(str(study / "et_pp-seed0"), str(study / "et_pp-seed1"))))
    assert report["baseline"] == ["et_pp"]
    assert {r["arm"] for r in report["equal_compute"]} == {"vanilla-1", "vanilla-2", "vanilla-4"}


def test_the_baseline_has_maes_optimiser_where_some_run_has(tmp_path):
    for epochs in (1, 2):
        write_run(tmp_path / f"muon{epochs}", curriculum="vanilla", opt="muon", epochs=epochs, flops=epochs * 1e12)
    assert len(compare(CompareConfig((str(tmp_path),)))["baseline"]) == 2
    write_run(tmp_path / "z", curriculum="vanilla", epochs=1)
    assert compare(CompareConfig((str(tmp_path),)))["baseline"] == ["z"]


def test_the_baseline_has_maes_mask_ratio_where_some_run_has(tmp_path):
    for epochs in (1, 2):
        write_run(tmp_path / f"cheap{epochs}", curriculum="vanilla", mask_ratio=0.9, epochs=epochs, flops=epochs * 1e12)
    assert len(compare(CompareConfig((str(tmp_path),)))["baseline"]) == 2
    write_run(tmp_path / "vanilla-seed0", curriculum="vanilla", epochs=1)
    assert compare(CompareConfig((str(tmp_path),)))["baseline"] == ["vanilla"]


def test_arms_with_other_decoders_are_compared_and_not_one_curve(tmp_path):
    """The decoder is thrown away and its cost is in the ledger, so what is judged is of one model."""
    for depth, flops in ((8, 2e12), (1, 1e12)):
        write_run(tmp_path / f"depth{depth}-seed0", curriculum="vanilla", decoder_depth=depth, flops=flops)
    report = compare(CompareConfig((str(tmp_path),)))
    assert len({arm["family"] for arm in report["arms"]}) == len(report["arms"]) == 2 and not report["forced"]
    write_run(tmp_path / "other-seed0", curriculum="vanilla", depth=2)
    with pytest.raises(ValueError, match=r"not comparable: depth is 24 in .*depth1-seed0 and 2 in .*other-seed0"):
        compare(CompareConfig((str(tmp_path),)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "ledger.json").write_text("{"), "ledger.json is damaged"),
        (lambda run: (run / "ledger.json").unlink(), "has no ledger.json yet"),
        (lambda run: (run / "config.yaml").unlink(), "holds no config.yaml"),
        (lambda run: (run / "config.yaml").write_text("epochz: 4"), "unknown key 'epochz'"),
        (lambda run: (run / "config.yaml").write_text(""), "config.yaml is damaged"),
        (lambda run: (run / "config.yaml").write_text("- like"), "config.yaml is damaged"),
        (lambda run: (run / "config.yaml").write_text("like: runs/a\nseed: x"), "config.yaml is damaged"),
        (lambda run: (run / "config.yaml").write_text("data_path: ''"), "config.yaml is damaged"),
        (lambda run: (run / "environment.json").write_text("null"), "environment.json is damaged"),
        (lambda run: change(run / "environment.json", packages=None), "names and values are expected, not None"),
        (
            lambda run: change(run / "environment.json", device=7),
            "environment.json .*device should be a word, not 7",
        ),
        (lambda run: change(run / "eval-knn.json", environment=None), "names and values are expected, not None"),
        (lambda run: change(run / "eval-knn.json", "flags", model=5), "eval-knn.json .*model should be a word, not 5"),
        (lambda run: change(run / "eval-knn.json", "flags", data_path=[1]), "data_path should be a word"),
        (lambda run: damage_line(run, 3), "metrics.jsonl is damaged .*line 3 is damaged"),
        (
            lambda run: (run / "metrics.jsonl").write_text(f'{{"step": 1, "p": 1.0, "loss": {10**400}}}\n'),
            "loss should be a finite number, not 1000",
        ),
        (lambda run: (run / "ledger.json").write_text('{"stages": [{"size_px": 32, "new": 1}]}'), "unknown key 'new'"),
        (lambda run: (run / "ledger.json").write_text("{}"), "ledger.json is damaged"),
        (lambda run: (run / "ledger.json").write_text('{"stages": []}'), "ledger.json is damaged"),
        (lambda run: (run / "ledger.json").write_text('{"stages": [1]}'), "ledger.json is damaged"),
        (lambda run: (run / "ledger.json").write_text('{"stages": [{"size_px": 32}]}'), "ledger.json books no"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n'), "metrics.jsonl is damaged"),
        (lambda run: (run / "metrics.jsonl").write_text("1\n"), "metrics.jsonl is damaged"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe"), "metrics.jsonl is damaged"),
        (lambda run: (run / "eval-knn.json").write_text("[]"), "eval-knn.json is damaged"),
        (
            lambda run: (run / "eval-knn.json").write_text("{}"),
            "eval-knn.json is damaged or of another version: it lacks",
        ),
        (lambda run: change(run / "eval-knn.json", top1=math.nan), "top1 should be a finite number, not nan"),
        (lambda run: change(run / "eval-knn.json", corrupted_top1=None), "corrupted_top1 should be a finite number"),
        (lambda run: change(run / "eval-knn.json", flags=[]), "eval-knn.json is damaged"),
        (lambda run: change(run / "eval-knn.json", places=[{}]), "layer should be a finite number, not None"),
        (lambda run: change(run / "eval-knn.json", places=[{"layer": 3, "top1": 5.0}]), "a place lacks its pooling"),
        (lambda run: change(run / "ledger.json", "stages", flops=math.nan), "ledger.json is damaged .*flops should be"),
        (lambda run: change(run / "ledger.json", "stages", train_seconds=math.inf), "train_seconds should be a finite"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "p": 1.0, "loss": NaN}\n'),
            "loss should be a finite",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "p": 1.0, "loss": 1.0, "knn_cls": 40.0}\n'),
            "metrics.jsonl is damaged .*flops should be a finite number, not None",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text(
                '{"step": 1, "p": 1.0, "loss": 1.0, "flops": 1, "seconds": 1, "rankme_cls": "x"}\n'
            ),
            "metrics.jsonl is damaged .*rankme_cls should be a finite number, not 'x'",
        ),
    ],
)
def test_damaged_folders_are_named_in_one_line(tmp_path, capsys, spoil, message):
    spoil(write_run(tmp_path / "a"))
    with pytest.raises(SystemExit) as end:
        main(["compare", str(tmp_path / "a"), "--force"])
    printed = capsys.readouterr()
    assert end.value.code == 1 and re.search(message, printed.err) and len(printed.err.splitlines()) == 1
    assert str(tmp_path / "a") in printed.err


def damage_line(run, number: int) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[number - 1] = lines[number - 1][:9]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_half_a_last_line_and_blank_ones_are_none(tmp_path):
    run = write_run(tmp_path / "a")
    text = (run / "metrics.jsonl").read_text()
    whole = compare(CompareConfig((str(run),)))
    (run / "metrics.jsonl").write_text(f"\n{text}\n" + '{"step": 10, "p": 1.0, "lo')
    assert compare(CompareConfig((str(run),)))["arms"] == whole["arms"]


def test_a_name_that_begins_with_an_underscore_is_in_the_legends(tmp_path):
    for name in ("_hidden", "plain"):
        curriculum = "vanilla" if name == "plain" else "et_pp"
        for seed in (0, 1):
            write_run(tmp_path / f"{name}-seed{seed}", curriculum=curriculum, seed=seed)
    figures = draw_figures(compare(CompareConfig((str(tmp_path),))))
    for name in ("knn-flops", "loss"):
        (legend,) = figures[name].legends
        assert sorted(text.get_text().strip() for text in legend.get_texts()) == ["_hidden", "plain"]


@pytest.mark.parametrize("lowfreq", ["fourier", "lanczos"])
def test_legends_lie_within_their_figures(tmp_path, lowfreq):
    """Also those of families that differ in many flags, and of a folder with a long name."""
    many = {"lr": 1.25e-4, "opt": "muon", "mask_ratio": 0.85, "clip_grad": 1.5, "lowfreq": lowfreq, "batch_size": 48}
    for epochs in (1, 2):
        write_run(tmp_path / f"vanilla-{epochs}e", curriculum="vanilla", epochs=epochs, flops=epochs * 1e12)
        write_run(tmp_path / f"other-{epochs}e", curriculum="et_pp", epochs=epochs, flops=epochs * 1e12, **many)
    write_run(tmp_path / f"a {'long ' * 22}name", curriculum="et", flops=1e12)
    for name, figure in draw_figures(compare(CompareConfig((str(tmp_path),)))).items():
        figure.canvas.draw()
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0, name


def test_many_arms_look_different(tmp_path):
    for i in range(20):
        write_run(tmp_path / f"arm{chr(97 + i)}", curriculum="vanilla", lr=1e-4 * (i + 1), flops=1e12)
    (legend,) = draw_figures(compare(CompareConfig((str(tmp_path),))))["knn-flops"].legends
    assert len({(line.get_color(), line.get_marker()) for line in legend.get_lines()}) == 20


def test_an_out_that_is_a_file_is_named_by_its_flag(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["compare", str(write_run(tmp_path / "a")), "--out", str(tmp_path / "file")])
    assert capsys.readouterr().err == f"mae_et compare: error: --out {tmp_path}/file: can't be created: File exists\n"


def test_nothing_is_left_of_a_comparison_that_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert "no such folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_online_quality_that_some_reports_lack_has_no_curve(tmp_path):
    run = write_run(tmp_path / "a")
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, more in ((4, {"knn_cls": 30.0}), (9, {})):
        points[i] |= {"flops": i * 1e11, "seconds": i, "knn_mean": 40 + i} | more
    (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    (curve,) = compare(CompareConfig((str(run),)))["arms"][0]["online_curves"]
    assert curve == {"flops": [4e11, 9e11], "seconds": [4, 9], "knn_mean": [44, 49]}


def test_online_quality_has_a_column_and_a_curve_where_runs_have_it(study):
    plain = compare(CompareConfig((str(study),)))
    assert "online" not in markdown(plain) and not any(name.startswith("online") for name in captions(plain))
    for run in study.glob("*-seed*"):
        points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for i in (4, 9):
            points[i] |= {"flops": i * 1e11, "seconds": i, "knn_mean": 40 + i + int(run.name[-1]), "rankme_mean": 3.0}
        (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    report = compare(CompareConfig((str(study),)))
    arm = next(arm for arm in report["arms"] if arm["name"] == "et_pp")
    assert arm["online"]["knn_mean"]["mean"] == 50 and arm["online"]["knn_mean"]["n"] == 3
    assert arm["online_curves"][0] == {
        "flops": [4e11, 9e11],
        "seconds": [4, 9],
        "knn_mean": [44, 49],
        "rankme_mean": [3.0, 3.0],
    }
    text = markdown(report)
    assert " | online kNN, mean of patches |" in text and "50.00 ± 1.00" in text and "RankMe" not in text
    curve, caption = draw_figures(report)["online-knn_mean"], captions(report)["online-knn_mean"]
    lines = curve.axes[0].get_lines()
    assert len(lines) == 12 and list(lines[0].get_ydata()) == [44, 49] and "against training FLOPs" in caption


# ── the verdict ──


def said(report: dict, arm: str) -> str:
    return " ".join(" ".join([head, *sentences]) for head, sentences in verdict(report) if head.startswith(arm))


def test_the_verdict_says_ahead_with_intervals_and_seeds(study):
    report = compare(CompareConfig((str(study),)))
    words = said(report, "et_pp")
    low, high = row(report, "equal_compute", "flops")["interval"]
    assert low > 0
    assert words.startswith("et_pp (n = 3, of each baseline arm 3)")
    assert f"At equal FLOPs: ahead in knn (+12.00 [{low:+.2f}, {high:+.2f}])." in words
    assert "At equal seconds: ahead in knn (+8.78 [" in words
    assert "FLOPs for equal quality: the baseline needs 2.83× [" in words and "as many in knn" in words
    assert (
        markdown(report).index("## Verdict") < markdown(report).index("knn-flops.png") < markdown(report).index("| n |")
    )


@pytest.mark.parametrize(
    ("top1", "words"),
    [
        (66.0, ("behind in knn", "the baseline's shortest arm has it already in knn")),
        (70.3, ("no difference that 3 seeds can tell in knn", "no difference that 3 seeds can tell in knn")),
        (99.0, ("ahead in knn", "the baseline does not reach it with 4.00× as many in knn")),
    ],
)
def test_the_verdict_in_plain_words(study, top1, words):
    for path in study.glob("et_pp-*/eval-knn.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"top1": result["top1"] - 82 + top1}))
    equal_flops, equal_quality = verdict(compare(CompareConfig((str(study),))))[0][1][:2]
    assert equal_flops.startswith(f"At equal FLOPs: {words[0]}") and f"quality: {words[1]}" in equal_quality


def test_seconds_that_spread_are_not_ranked(study):
    """By an arm that spreads itself; by all, where one of the baseline does."""
    write_run(study / "et-seed0", 0, 1e12, 80.0, 100.0, curriculum="et", stage_sizes=[16, 32])
    write_run(study / "et-seed1", 1, 1e12, 80.0, 150.0, curriculum="et", stage_sizes=[16, 32])
    report = compare(CompareConfig((str(study),)))
    assert report["wide_seconds"] == {"et": pytest.approx(np.std([100, 150], ddof=1) / 125)}
    assert "seconds" not in said(report, "et (") and "At equal seconds" in said(report, "et_pp")
    assert "Not every arm (left out: et) is ranked by seconds" in said(report, "All arms")
    text = markdown(report)
    assert text.count("not ranked: wide spread") == 2 and "et (28%)" in text  # both of its answers by seconds
    ledger = json.loads((study / "vanilla-4-seed1" / "ledger.json").read_text())
    ledger["stages"][0]["train_seconds"] *= 2
    (study / "vanilla-4-seed1" / "ledger.json").write_text(json.dumps(ledger))
    report = compare(CompareConfig((str(study),)))
    assert "No arm is ranked by seconds" in said(report, "All arms") and "second" not in said(report, "et_pp")


def test_the_verdict_of_one_seed_one_length_or_nothing(tmp_path):
    write_run(tmp_path / "a", top1=70.0)
    assert verdict(compare(CompareConfig((str(tmp_path),)))) == [
        ("No verdict", ["There is no arm beside the baseline."])
    ]
    write_run(tmp_path / "c", top1=80.5, curriculum="et", stage_sizes=[16, 32])
    report = compare(CompareConfig((str(tmp_path),)))
    assert "one seed, so nothing is sure, in knn (+10.50)" in said(report, "c (")
    assert "the baseline has one length only" in said(report, "All arms")


def test_a_baseline_without_an_evaluation_is_said_and_nothing_else(study):
    for run in study.glob("et_pp-*"):
        evaluate_again(run, "linear_probe", 99.0)
    report = compare(CompareConfig((str(study),)))
    words = said(report, "et_pp")
    assert "n = 3, of each baseline arm 3 in knn; n = 3, of the baseline none in linear_probe" in words
    assert "ahead in knn (+12.00 [" in words and "the baseline is not evaluated in linear_probe." in words
    assert "outside" not in words and "already in linear_probe" not in words
    found = next(r for r in report["equal_compute"] if r["protocol"] == "linear_probe")
    assert answer_compute(found) == "baseline not evaluated"
    for result in study.glob("vanilla-*/eval-knn.json"):
        result.unlink()
    report = compare(CompareConfig((str(study),)))
    assert said(report, "et_pp").count("the baseline is not evaluated in knn, linear_probe") == 2  # FLOPs and seconds
    assert "equal quality" not in said(report, "") and "one length" not in said(report, "")


def test_a_baseline_evaluated_at_one_of_its_lengths_has_more_than_one(study):
    for result in study.glob("vanilla-[24]-*/eval-knn.json"):
        result.unlink()
    assert "the baseline is evaluated at one length only" in said(compare(CompareConfig((str(study),))), "All arms")


def test_the_head_of_an_arm_counts_the_seeds_of_every_evaluation(study):
    for run in study.glob("*-seed0"):
        evaluate_again(run, "linear_probe", 50.0)
    words = said(compare(CompareConfig((str(study),))), "et_pp")
    assert "(n = 3, of each baseline arm 3 in knn; n = 1, of each baseline arm 1 in linear_probe)" in words


def test_seconds_of_different_devices_are_not_ranked(study):
    """Another precision is no other device."""
    for device, precision, ranked in (("cpu", "fp32", True), ("cuda (H100)", "bf16", False)):
        for run in study.glob("et_pp-*"):
            environment = json.loads((run / "environment.json").read_text())
            environment |= {"device": f"{device}, {precision}", "precision": precision}
            (run / "environment.json").write_text(json.dumps(environment))
        report = compare(CompareConfig((str(study),)))
        assert ("At equal seconds" in said(report, "et_pp")) == ranked
        assert any("different machines" in warning for warning in report["warnings"]) != ranked
        assert (answer_compute(row(report, "equal_compute", "seconds")) == "not ranked: different devices") != ranked
        assert (answer_quality(row(report, "equal_quality", "seconds")) == "not ranked: different devices") != ranked
        assert "not ranked" not in answer_compute(row(report, "equal_compute", "flops"))
    assert "No arm is ranked by seconds: its runs and the baseline's" in said(report, "All arms")
    assert "spread" not in said(report, "All arms")


def time_again(run: Path, train_seconds: float, data_seconds: float, began: str = "noon") -> None:
    """A timing.json as benchmarks/quiet_pass.py writes it, with the same seconds for a step of every stage."""
    stages = len(json.loads((run / "ledger.json").read_text())["stages"])
    timing = {"device": "cpu (7 cores), fp32", "began": began, "steps": 5}
    timing |= {"train_seconds": [train_seconds] * stages, "data_seconds": [data_seconds] * stages}
    (run / "timing.json").write_text(json.dumps(timing))


def test_seconds_are_those_of_one_pass_where_all_runs_have_it(study):
    """The runs' own spread widely and are of several machines; in the pass each stage takes 10 steps of 3 s."""
    for i, run in enumerate(sorted(study.iterdir())):
        ledger = json.loads((run / "ledger.json").read_text())
        ledger["stages"][0]["train_seconds"] *= 1 + i
        (run / "ledger.json").write_text(json.dumps(ledger))
        environment = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps(environment | {"device": f"cpu ({i} cores)"}))
        if run.name != "et_pp-seed0":
            time_again(run, 2, 1)
    report = compare(CompareConfig((str(study),)))
    assert "No arm is ranked by seconds" in said(report, "All arms")
    assert any(
        "those of the runs themselves" in w and ": et_pp-seed0 without timing.json" in w for w in report["warnings"]
    )
    assert 30 not in [seconds for arm in report["arms"] for seconds in arm["seconds"]["values"]], "all or none"
    time_again(study / "et_pp-seed0", 2, 1)
    report = compare(CompareConfig((str(study),)))
    seconds = {arm["name"]: arm["seconds"]["values"] for arm in report["arms"]}
    assert seconds == {"vanilla-1": [30] * 3, "vanilla-2": [30] * 3, "vanilla-4": [30] * 3, "et_pp": [60] * 3}
    assert all(arm["data_wait"]["mean"] == pytest.approx(1 / 3) for arm in report["arms"])
    assert all(stage["seconds"]["mean"] == 30 for arm in report["arms"] for stage in arm["stages"])
    assert "At equal seconds" in said(report, "et_pp") and "All arms" not in said(report, "")
    assert not any("machines" in warning for warning in report["warnings"])
    assert any(
        "one pass" in w and ", 5 steps of each" in w and "cpu (7 cores), fp32, noon" in w for w in report["warnings"]
    )
    for run in study.glob("vanilla-4-*"):
        time_again(run, 2, 1, began="midnight")
    report = compare(CompareConfig((str(study),)))
    assert "No arm is ranked by seconds" in said(report, "All arms")
    assert any("several passes" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_seconds": [1.0, 1.0]}, "not one time for each of 1 stages"),
        ({"data_seconds": [-1.0]}, "takes some time"),
        ({"train_seconds": [math.nan]}, "takes some time"),
        ({"train_seconds": [math.inf]}, "takes some time"),
        ({"train_seconds": "soon"}, "train_seconds"),
        ({"stages": 3}, "stages"),
    ],
)
def test_a_damaged_timing_is_named(tmp_path, change, message):
    run = write_run(tmp_path / "a")
    time_again(run, 2, 1)
    timing = json.loads((run / "timing.json").read_text())
    (run / "timing.json").write_text(json.dumps(timing | change))
    with pytest.raises(ValueError, match=f"timing.json is damaged.*{message}"):
        compare(CompareConfig((str(tmp_path),)))


# ── archives ──

CRC_OF_EMPTY = zlib.crc32(b"{}").to_bytes(4, "little")


def archive(path: Path, members: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def files_of(*runs: Path) -> dict[str, bytes]:
    return {f"{run.name}/{file.name}": file.read_bytes() for run in runs for file in run.iterdir()}


def test_an_archive_gives_the_report_of_its_folders(study):
    """As itself, as runs.zip of a folder, and next to folders, which come before archived ones of the same name."""
    expected = compare(CompareConfig((str(study),)))
    folders = sorted(study.iterdir())
    packed = study / "packed"
    packed.mkdir()
    path = archive(packed / "runs.zip", files_of(*folders))
    for paths in ([path], [packed], [packed, path], [path / run.name for run in folders]):
        assert compare(CompareConfig(tuple(map(str, paths)))) == expected
    archive(path, files_of(*folders[4:]) | {f"{folders[0].name}/config.yaml": "{", "notes.txt": "not a run"})
    for run in folders[:4]:
        run.rename(packed / run.name)
    assert compare(CompareConfig((str(packed),))) == expected
    one = archive(study / "one.zip", {file.name: file.read_bytes() for file in folders[5].iterdir()})  # a run itself
    assert compare(CompareConfig((str(one),)))["arms"][0]["n"] == 1


def test_a_run_in_an_archive_is_named_by_both(study):
    """On the command line, to compare with, and in messages, from which it can be pasted there."""
    path = archive(study / "all.zip", files_of(*study.iterdir()))
    named = path / "et_pp-seed0"
    report = compare(CompareConfig((str(path),), baseline=(str(named), str(path / "et_pp-seed1"))))
    assert report["baseline"] == ["et_pp"]
    with pytest.raises(ValueError, match=r"et_pp-seed0 are the same configuration with the same seed") as refused:
        compare(CompareConfig((str(path), str(study))))
    assert str(refused.value).split(" are ")[0] == f"{named} and {study / 'et_pp-seed0'}"
    with pytest.raises(FileNotFoundError, match=f"{path}/et_pp-seed9: no such folder"):
        compare(CompareConfig((str(path / "et_pp-seed9"),)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-100], "neither a run folder nor an intact zip archive"),
        (lambda data: data[:90] + b"?" + data[91:], "neither a run folder nor an intact zip archive"),
        (lambda data: data.replace(CRC_OF_EMPTY, b"CRC?"), "aa/empty.json in it is corrupt"),
        (lambda data: b"", "neither a run folder nor an intact zip archive"),
        (lambda data: b"epochs: 4", "neither a run folder nor an intact zip archive"),
        (lambda data: data.replace(b"aa/", b"aa-"), "holds no config.yaml"),
        (lambda data: data.replace(b"ledger.json", b"\x1b[31m.json_"), r"it holds the name 'aa/\x1b[31m.json_'"),
        (lambda data: data.replace(b"aa/", b"../"), "it holds the name '../"),  # would stand for the archive's folder
        (lambda data: data.replace(b"ledger", b"legder"), "has no ledger.json yet"),
        (lambda data: data.replace(b"environment.json", b"environment.yaml"), "environment.json is missing"),
    ],
)
def test_an_archive_that_is_no_study_is_named_in_one_line(tmp_path, capsys, spoil, message):
    path = archive(tmp_path / "runs.zip", files_of(write_run(tmp_path / "aa")) | {"aa/empty.json": "{}"})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(SystemExit) as end:
        main(["compare", str(path)])
    printed = capsys.readouterr()
    assert end.value.code == 1 and len(printed.err.splitlines()) == 1
    assert message in printed.err and str(path) in printed.err


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    path = archive(tmp_path / "runs.zip", files_of(write_run(tmp_path / "a")) | {"a/zeros": bytes(2**20)})
    assert path.stat().st_size < 2**13
    monkeypatch.setattr(runs, "MAX_UNPACKED_BYTES", 2**20)
    with pytest.raises(ValueError, match=r"runs\.zip .* it unpacks to 0\.0 GiB"):
        compare(CompareConfig((str(path),)))


@pytest.mark.parametrize(
    ("arguments", "unloaded"), [(["--help"], {"torch", "matplotlib", "timm"}), ([], {"torch", "timm"})]
)
def test_comparing_needs_no_torch_and_its_help_no_matplotlib(study, arguments, unloaded):
    code = f"""
import sys
from mae_et.cli import main
try:
    main(["compare", {str(study)!r}, *{arguments}])
finally:
    loaded = {unloaded} & set(sys.modules)
    assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--baseline" in done.stdout if arguments else "Two answers" in done.stdout


def test_no_vanilla_run_asks_for_a_baseline(tmp_path):
    write_run(tmp_path / "a", curriculum="et", stage_sizes=[16, 32])
    with pytest.raises(ValueError, match="--baseline"):
        compare(CompareConfig((str(tmp_path),)))


# ── the command ──


class Page(HTMLParser):
    """Balanced tags, and every address that the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.loads, self.cells = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        self.cells += tag == "td"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_command_writes_a_report_that_needs_nothing_else(study):
    out = study / "out"
    command = [sys.executable, "-m", "mae_et", "compare", str(study), "--out", str(out), "--json", "--title", "A <b>"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "report.json").read_text())
    page = Page()
    page.feed((out / "report.html").read_text())
    assert not page.open and page.loads and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert "A &lt;b&gt;" in (out / "report.html").read_text()
    text = (out / "report.md").read_text()
    assert page.cells > 50 and "2.83× [" in text and "+12.00 [" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (out / line.partition("(")[2].partition(")")[0]).stat().st_size < 300_000


def test_a_report_is_the_same_from_the_same_files(study, tmp_path):
    report = compare(CompareConfig((str(study),)))
    again = compare(CompareConfig((str(study),)))
    assert report == again
    first, second = (write_report(copy.deepcopy(r), tmp_path / str(i)) for i, r in enumerate((report, again)))
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (1.2345e13, "1.23e13"),
        (12345.6, "12,346"),
        (99.96, "100"),
        (437.2, "437"),
        (0.5, "0.5"),
        (2e-5, "2.00e-5"),
    ],
)
def test_numbers_as_people_write_them(value, text):
    assert number(value) == text


def test_seconds_of_one_kind_of_device_in_two_machines_are_not_ranked(tmp_path):
    for seed in (0, 1):
        for curriculum, platform in (("vanilla", "Linux-1"), ("et", "Linux-2")):
            environment = {"device": "cpu (1 core)", "platform": platform}
            write_run(tmp_path / f"{curriculum}-seed{seed}", seed, curriculum=curriculum, environment=environment)
    report = compare(CompareConfig((str(tmp_path),)))
    assert any(
        "(cpu (1 core) on Linux-1; cpu (1 core) on Linux-2): don't compare" in line for line in report["warnings"]
    )
    assert {row["not_ranked"] for row in report["equal_compute"] if row["axis"] == "seconds"} == {"different devices"}


def test_without_runs_it_says_what_is_missing():
    with pytest.raises(ValueError, match="RUN is missing: give run folders"):
        compare(CompareConfig(()))


def test_an_evaluation_of_untrained_models_alone_is_drawn_without_a_legend(tmp_path, recwarn):
    run = write_run(tmp_path / "vanilla", curriculum="vanilla")
    write_untrained(tmp_path / "untrained", like=str(run), knn=True, k=20)
    (run / "eval-knn.json").unlink()
    main(["compare", str(tmp_path), "--out", str(tmp_path / "report")])
    assert not [warning for warning in recwarn if "No artists" in str(warning.message)]

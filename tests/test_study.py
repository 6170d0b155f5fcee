"""The study harness: arms matched in FLOPs and steps, a tiny study through the real scripts, and going on with it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mae_et.compare.compare import CompareConfig, compare
from mae_et.compare.report import markdown

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
STUDY_OF = {path.stem: path for path in STUDIES}
RESULTS = sorted(path.parent for path in (ROOT / "docs" / "results").glob("*/report.json"))


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("equal_accuracy", ROOT / "benchmarks" / "equal_accuracy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_match_what_they_say(harness, monkeypatch, path):
    monkeypatch.setattr(harness, "count_images", lambda config: 3264 if config.data_path == "photos" else 60_000)
    study = yaml.safe_load(path.read_text())
    for arm in study["arms"].values():
        (arm or {}).pop("seeds", None)  # arms that are run elsewhere, too
    jobs = harness.jobs_of(study, harness.StudyConfig(path), None)
    assert len({job.name for job in jobs}) == len(jobs) == len(study["arms"]) * len(study["seeds"])
    plans = {job.arm: harness.planned(job.flags)[1] for job in jobs if job.flags}
    for name, arm in study["arms"].items():
        if other := (arm or {}).get("match_flops"):
            assert plans[name].total_flops == pytest.approx(plans[other].total_flops, rel=0.002)
        if other := (arm or {}).get("match_steps"):
            assert plans[name].total_steps == pytest.approx(plans[other].total_steps, rel=0.01)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_results_give_the_committed_report(folder):
    stored = json.loads((folder / "report.json").read_text())
    beside = yaml.safe_load(STUDY_OF[folder.name].read_text()).get("beside", []) if folder.name in STUDY_OF else []
    others = [str(path) for pattern in beside for path in sorted(folder.parent.glob(pattern))]
    again = compare(CompareConfig((str(folder), *others), title=stored["title"]))
    text = (folder / "report.md").read_text()
    assert markdown(again, {}).partition("## Pictures")[0] == text.partition("## Pictures")[0]


def test_an_unknown_arm_is_named(harness):
    study = {"flags": {"recipe": "demo"}, "seeds": [0], "arms": {"a": {}}, "evaluate": []}
    with pytest.raises(ValueError, match=r"no arm 'b'.*choose from a"):
        harness.jobs_of(study, harness.StudyConfig(Path("x.yaml"), arms=("b",)), None)


@pytest.mark.long
def test_a_study_runs_keeps_its_results_and_goes_on(tmp_path):
    probe = {"knn": True, "k": 3, "train_images": 34, "eval_images": 34, "num_workers": 0}
    study = {
        "flags": {
            "recipe": "demo",
            "curriculum": "vanilla",
            "input_size": 16,
            "embed_dim": 24,
            "num_heads": 2,
            "depth": 1,
            "decoder_embed_dim": 16,
            "decoder_num_heads": 2,
            "decoder_depth": 1,
            "patch_size": 4,
            "epochs": 0.1,
            "warmup_epochs": 0,
            "num_workers": 0,
        },
        "seeds": [0],
        "arms": {
            "plain": {"evaluate": []},
            "grown": {
                "curriculum": "custom",
                "stages": [{"size_px": 8, "share": 0.5}, {"size_px": 16, "share": 0.5}],
                "match_flops": "plain",
            },
        },
        "evaluate": [probe],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "benchmarks/equal_accuracy.py", str(tmp_path / "study.yaml"), "--discard"]
    command += ["--out", str(tmp_path / "out"), "--keep", str(tmp_path / "kept")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    kept = tmp_path / "kept"
    assert {path.name for path in (kept / "grown-seed0").iterdir()} == {
        *("config.yaml", "environment.json", "ledger.json", "metrics.jsonl", "eval-knn-34-of-34.json")
    }
    assert not (tmp_path / "out" / "grown-seed0").exists()  # discarded
    report = json.loads((kept / "report.json").read_text())
    costs = {arm["name"]: arm["flops"] for arm in report["arms"]}
    assert costs["grown"] == pytest.approx(costs["plain"], rel=0.15)  # five steps: whole ones
    logs = [(tmp_path / "out" / f"{name}-seed0.log").read_text() for name in ("plain", "grown")]
    (kept / "report.json").unlink()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert logs == [(tmp_path / "out" / f"{name}-seed0.log").read_text() for name in ("plain", "grown")]
    assert json.loads((kept / "report.json").read_text()) == report

"""The study harness: arms matched in FLOPs and steps, archives, committed reports, and a tiny study end to end."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import struct
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import yaml
from ranks import in_a_process

from mae_et import cli
from mae_et.compare.compare import CompareConfig, compare
from mae_et.compare.report import markdown
from mae_et.plan.flags import to_dict

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
STUDY_OF = {path.stem: path for path in STUDIES}
IMAGES = {"photos": 3264, "/usr/share/datasets/fashion-mnist": 60_000}
IMAGES |= {"/data/natural/tiles": 18_161, "/data/natural/tuning": 13_761, "/data/solar_cells": 1_970}
IMAGES |= {"/data/cifar10/images": 50_000, "/data/cifar10/tuning": 40_000}
RESULTS = sorted(path.parent for path in (ROOT / "docs" / "results").glob("*/report.md"))


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("equal_accuracy", ROOT / "benchmarks" / "equal_accuracy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_match_what_they_say(harness, monkeypatch, path):
    monkeypatch.setattr(harness, "count_images", lambda config: IMAGES[config.data_path])
    study = yaml.safe_load(path.read_text())
    for arm in study["arms"].values():
        (arm or {}).pop("seeds", None)  # arms that are run elsewhere, too
    jobs = harness.jobs_of(study, harness.StudyConfig(path), None)
    assert len({job.name for job in jobs}) == len(jobs) == len(study["arms"]) * len(study["seeds"])
    plans = {job.arm: harness.planned(job.flags)[1] for job in jobs if job.flags}
    for name, arm in study["arms"].items():
        if other := (arm or {}).get("match_flops"):
            assert plans[name].total_flops == pytest.approx(plans[other].total_flops, rel=0.002)
            (mine, theirs) = (next(job.flags for job in jobs if job.arm == n) for n in (name, other))
            if arm.keys().isdisjoint({"warmup_epochs", "hold_epochs"}):
                for part in ("warmup_epochs", "hold_epochs"):  # the same share of the run
                    assert mine[part] / mine["epochs"] == pytest.approx(
                        theirs.get(part, 0) / theirs["epochs"],
                        abs=2e-4,  # rounded
                    )
        if other := (arm or {}).get("match_steps"):
            batch = next(job.flags["batch_size"] for job in jobs if job.arm == name)  # a whole number
            assert plans[name].total_steps == pytest.approx(plans[other].total_steps, rel=max(0.01, 0.5 / batch))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_results_give_the_committed_report(harness, folder):
    text = (folder / "report.md").read_text()
    study = yaml.safe_load(STUDY_OF[folder.name].read_text()) if folder.name in STUDY_OF else {}
    runs = (str(folder), *harness.beside(study, folder.parent))
    report = compare(CompareConfig(runs, title=text.partition("\n")[0].removeprefix("# ")))
    assert markdown(report) == text
    names = re.findall(r"!\[.*\]\((.*)\)", text)
    assert {f"{protocol}-flops.png" for protocol in report["protocols"]} < set(names)
    assert {path.name for path in folder.iterdir()} - {"report.html", "report.json"} == {
        "report.md",
        "runs.zip",
        *names,
    }


def test_an_archive_holds_the_runs_and_nothing_of_when_they_were_written(harness, tmp_path):
    """Packed at once or one by one, with new dates: the same bytes. Members are what the folders held."""
    for kept, order in ((tmp_path / "once", [("a", "b")]), (tmp_path / "twice", [("b",), ("a",)])):
        for age, names in enumerate(order):
            for name in names:
                (kept / name).mkdir(parents=True)
                for file in ("metrics.jsonl", "config.yaml"):
                    (kept / name / file).write_text(f"{name}: {file}")
                    os.utime(kept / name / file, (age * 1e6, age * 1e6))
            harness.pack(kept)
        assert [path.name for path in kept.iterdir()] == ["runs.zip"]
    assert (tmp_path / "once" / "runs.zip").read_bytes() == (tmp_path / "twice" / "runs.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "once" / "runs.zip") as archive:
        assert archive.namelist() == ["a/config.yaml", "a/metrics.jsonl", "b/config.yaml", "b/metrics.jsonl"]
        assert archive.read("b/config.yaml") == b"b: config.yaml"
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_run_that_is_packed_again_replaces_the_archived_one(harness, tmp_path):
    job = harness.Job("plain", 0, {"recipe": "demo"}, {"eval-knn.json": {}})
    for content in ("old", "new"):
        run = tmp_path / job.name
        run.mkdir()
        for name in job.kept_files:
            assert not (content == "old" and harness.is_kept(job, tmp_path))
            (run / name).write_text(content)
        (run / content).mkdir()
        (run / content / "model.safetensors").write_text(content)
        harness.pack(tmp_path)
        assert harness.is_kept(job, tmp_path) and not run.exists()
    archive = zipfile.ZipFile(tmp_path / "runs.zip")
    assert archive.read(f"{job.name}/config.yaml") == b"new"
    assert [name for name in archive.namelist() if "model" in name] == [f"{job.name}/new/model.safetensors"]


def test_an_unknown_arm_is_named(harness):
    study = {"flags": {"recipe": "demo"}, "seeds": [0], "arms": {"a": {}}, "evaluate": []}
    with pytest.raises(ValueError, match=r"no arm 'b'.*choose from a"):
        harness.jobs_of(study, harness.StudyConfig(Path("x.yaml"), arms=("b",)), None)


def test_a_branch_comes_after_its_trunk(harness):
    """Wherever the file has it. --arms may leave the trunk out, if it ran before."""
    arms = {"b": {"branch": "a"}, "c": {"branch": "b"}, "a": {}, "d": {}}
    study = {"flags": {"recipe": "demo"}, "seeds": [0, 1], "arms": arms, "evaluate": []}
    jobs = harness.jobs_of(study, harness.StudyConfig(Path("x.yaml")), None)
    assert [(job.arm, job.seed) for job in jobs] == [(arm, seed) for seed in (0, 1) for arm in "adbc"]
    (job,) = harness.jobs_of(study, harness.StudyConfig(Path("x.yaml"), arms=("c",), seeds=(1,)), None)
    assert job.branch == "b"
    arms["b"]["branch"] = "e"
    with pytest.raises(ValueError, match=r"x.yaml: branch: no arm 'e' in x.yaml; choose from b, c, a, d"):
        harness.jobs_of(study, harness.StudyConfig(Path("x.yaml")), None)
    arms["b"]["branch"] = "c"
    with pytest.raises(ValueError, match=r"x.yaml: branch: b of c of b: an arm can't begin with itself"):
        harness.jobs_of(study, harness.StudyConfig(Path("x.yaml")), None)


STUDY = {"flags": {"recipe": "demo"}, "seeds": [0], "arms": {"a": {}}, "evaluate": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": None}, "a study needs flags, seeds, arms, evaluate; seeds is missing, or no list"),
        ({"flags": {}}, "flags: `recipe` is missing"),
        ({"arms": {"a": {"match_flops": "b"}}}, "match_flops: no arm 'b' in .*choose from a"),
        ({"arms": {"a": {"match_steps": "b"}}}, "match_steps: no arm 'b'"),
        ({"arms": {"a": {"pretrain": False, "like": "b"}}}, "like: no arm 'b'"),
        ({"arms": {"a": {"pretrain": False}}}, "a: `pretrain: false` and `like: ARM` go together"),
        ({"arms": {"a": {"match_flops": "a"}}}, "match_flops, match_steps: a like a is a circle"),
        ({"arms": {"a b": {}, "a_b": {}}}, "arms 'a b' and 'a_b' have the same folder a_b-seed0"),
    ],
)
def test_a_mistake_in_a_study_gets_one_line(harness, tmp_path, changes, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: {message}"):
        harness.jobs_of(harness.read_study(path), harness.StudyConfig(path), None)
    with pytest.raises(FileNotFoundError, match=r"STUDY: no file nowhere\.yaml"):
        harness.read_study(Path("nowhere.yaml"))


def test_flops_are_matched_in_the_order_in_which_they_depend(harness):
    arms = {"a": {"curriculum": "et_pp", "match_flops": "b"}, "b": {"match_flops": "c"}, "c": {"epochs": 20}}
    jobs = harness.jobs_of(STUDY | {"arms": arms}, harness.StudyConfig(Path("x.yaml")), None)
    flops = {job.arm: harness.planned(job.flags)[1].total_flops for job in jobs}
    assert flops["a"] == pytest.approx(flops["c"], rel=0.02) and flops["b"] == pytest.approx(flops["c"], rel=0.02)


def test_a_kept_run_of_other_flags_is_refused(harness, tmp_path):
    """Of the training and of the evaluation; not what follows from how FLOPs are counted."""
    study = STUDY | {"evaluate": [{"knn": True, "k": 5}], "arms": {"a": {}, "b": {"match_flops": "a"}}}
    config = harness.StudyConfig(Path("x.yaml"), keep=tmp_path)
    for job in harness.jobs_of(study, config, None):
        run = tmp_path / job.name
        run.mkdir()
        changes = {"epochs": 77.0} if job.arm == "b" else {}
        values = to_dict(harness.planned(job.flags)[0]) | changes
        (run / "config.yaml").write_text(yaml.safe_dump(values))
        (run / "eval-knn.json").write_text(json.dumps({"flags": {"k": 5, "knn": True}}))
        for name in ("environment.json", "ledger.json", "metrics.jsonl"):
            (run / name).touch()
        harness.check_unchanged(job, tmp_path)
    (job, _) = harness.jobs_of(study | {"flags": {"recipe": "demo", "mask_ratio": 0.5}}, config, None)
    with pytest.raises(ValueError, match=r"a-seed0 was run with --mask_ratio 0.75, not 0.5: remove it"):
        harness.check_unchanged(job, tmp_path)
    (job, _) = harness.jobs_of(study | {"evaluate": [{"knn": True, "k": 7}]}, config, None)
    with pytest.raises(ValueError, match=r"a-seed0 was run with --k 5, not 7: remove it"):
        harness.check_unchanged(job, tmp_path)


def test_an_arm_waits_for_the_run_it_is_like_which_is_not_discarded(harness, monkeypatch, tmp_path):
    """And says so where that run is gone."""
    arms = {"a": {}, "scratch": {"pretrain": False, "like": "a"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"arms": arms, "evaluate": [{"knn": True}]}))
    words = ["equal_accuracy.py", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    calls = []

    def script(name, words, log, cores):
        time.sleep(0.2 * (name == "main_pretrain.py"))
        flags = dict(itertools.pairwise(words))
        if "--like" in flags:
            assert (Path(flags["--like"]) / "config.yaml").exists()
        folder = Path(flags.get("--output_dir") or flags["--finetune"])
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("config.yaml", "environment.json", "ledger.json", "metrics.jsonl", "eval-knn.json"):
            (folder / file).touch()
        calls.append(folder.name)
        return ""

    monkeypatch.setattr(harness, "script", script)
    monkeypatch.setattr(harness, "mae_et", lambda words: None)
    monkeypatch.setattr(sys, "argv", [*words, "--discard"])
    harness.main()
    assert calls == ["a-seed0", "scratch-seed0"] and (tmp_path / "out/a-seed0").exists()
    shutil.rmtree(tmp_path / "out/a-seed0")
    (job,) = harness.jobs_of(
        harness.read_study(tmp_path / "study.yaml"), harness.StudyConfig(Path("x.yaml"), arms=("scratch",)), None
    )
    told = harness.run_job(
        job, harness.StudyConfig(Path("x.yaml"), out=tmp_path / "out", keep=tmp_path / "new"), None, []
    )
    assert re.search("it needs the run .*a-seed0, which is not there; take a-seed0 out of .*new", told)


def test_two_evaluations_that_write_the_same_result_are_refused(harness):
    knn, other = {"knn": True}, {"knn": True, "layers": [2]}
    study = {"flags": {"recipe": "demo"}, "seeds": [0], "arms": {"a": {}}, "evaluate": [knn, other]}
    with pytest.raises(ValueError, match=r"two evaluations write the same result of eval-knn\.json"):
        harness.jobs_of(study, harness.StudyConfig(Path("x.yaml")), None)
    study["evaluate"] = [knn, knn | {"global_pool": True}]
    (job,) = harness.jobs_of(study, harness.StudyConfig(Path("x.yaml")), None)
    assert list(job.evaluations) == ["eval-knn.json", "eval-knn-mean.json"]
    study["evaluate"] = [knn | {"linear_probe": True}, knn]
    with pytest.raises(ValueError, match="two evaluations write the same result"):
        harness.jobs_of(study, harness.StudyConfig(Path("x.yaml")), None)


def test_two_probes_in_one_call_are_two_results(harness):
    study = {"flags": {"recipe": "demo"}, "seeds": [0], "arms": {"a": {}}}
    study["evaluate"] = [{"knn": True, "linear_probe": True}]
    (job,) = harness.jobs_of(study, harness.StudyConfig(Path("x.yaml")), None)
    assert list(job.evaluations) == ["eval-knn.json", "eval-linear_probe.json"]


def one_real_script(script, calls, name, words, log, cores):
    """The first arm by the script itself, others by what it calls, which need not wait for torch to load."""
    calls.append(name)
    if log.name.startswith("plain"):
        return script(name, words, log, cores)
    in_a_process(log, getattr(cli, Path(name).stem), words)
    return ""


@pytest.mark.long
def test_a_study_runs_keeps_its_results_and_goes_on(harness, monkeypatch, tmp_path):
    probe = {"knn": True, "linear_probe": True, "k": 3, "train_images": 34, "eval_images": 34, "num_workers": 0}
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
            "longer": {
                "branch": "plain",
                "curriculum": "custom",
                "epochs": 0.2,
                "stages": [{"size_px": 16, "share": 0.5}, {"size_px": 16, "share": 0.5}],
                "evaluate": [],
            },
        },
        "evaluate": [probe],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = ["equal_accuracy.py", str(tmp_path / "study.yaml"), "--discard"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out"), "--keep", str(tmp_path / "kept")])
    monkeypatch.chdir(ROOT)
    calls = []
    monkeypatch.setattr(harness, "script", partial(one_real_script, harness.script, calls))
    harness.main()
    kept = tmp_path / "kept"
    assert not any(path.is_dir() for path in kept.iterdir())
    with zipfile.ZipFile(kept / "runs.zip") as archive:
        results = [f"eval-{probe}-34-of-34.json" for probe in ("knn", "linear_probe")]
        of_a_run = ["config.yaml", "environment.json", *results, "ledger.json", "metrics.jsonl"]
        assert [name for name in archive.namelist() if "grown" in name] == [f"grown-seed0/{name}" for name in of_a_run]
        texts = [archive.read(name).decode() for name in archive.namelist()]
        assert any("grown-seed0.yaml" in text for text in texts)
        assert calls.count("main_finetune.py") == 1  # of both probes
        assert [t for t in texts for place in (ROOT, tmp_path / "out") if str(place) in t] == []
        longer, plain = (
            json.loads(archive.read(f"{name}-seed0/ledger.json"))["stages"] for name in ("longer", "plain")
        )
        assert longer[0] == plain[0] and longer[1]["steps"] == plain[0]["steps"]
    left = [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert left == ["plain-seed0"]  # a branch of which may still come
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--arms", "plain"])
    harness.main()
    assert (tmp_path / "out" / "plain-seed0").exists()
    monkeypatch.setattr(sys, "argv", sys.argv[:-2])
    report = json.loads((kept / "report.json").read_text())
    costs = {arm["name"]: arm["flops"] for arm in report["arms"]}
    assert costs["grown"] == pytest.approx(costs["plain"], rel=0.15)  # five steps: whole ones
    logs = [(tmp_path / "out" / f"{name}-seed0.log").read_text() for name in ("plain", "grown")]
    packed = (kept / "runs.zip").read_bytes()
    (kept / "report.json").unlink()
    harness.main()
    assert logs == [(tmp_path / "out" / f"{name}-seed0.log").read_text() for name in ("plain", "grown")]
    assert json.loads((kept / "report.json").read_text()) == report
    assert (kept / "runs.zip").read_bytes() == packed


def test_photographs_are_read_out_of_a_resource_archive():
    """The tree of a Qt resource archive, written by hand: a folder with an image and a compressed script."""
    spec = importlib.util.spec_from_file_location("natural_images", ROOT / "benchmarks" / "natural_images.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    words, contents = ["animals", "a.webp", "b.js"], [b"an image", b"\0\0\0\0"]
    names, name_at = b"", []
    for word in words:
        name_at.append(len(names))
        names += struct.pack(">HI", len(word), 0) + word.encode("utf-16-be")
    data, data_at = b"", []
    for content in contents:
        data_at.append(len(data))
        data += struct.pack(">I", len(content)) + content
    nodes = [(0, 2, 1, 1), (name_at[0], 2, 2, 2), (name_at[1], 0, 0, data_at[0]), (name_at[2], 4, 0, data_at[1])]
    tree = b"".join(struct.pack(">IHIIQ", *node, 0) for node in nodes)
    archive = b"qres" + struct.pack(">IIII", 3, 20, 20 + len(tree), 20 + len(tree) + len(data)) + tree + data + names
    assert list(module.rcc_files(archive)) == [("/animals/a.webp", b"an image")]
    with pytest.raises(ValueError, match="not a Qt resource archive of version 1 to 3"):
        list(module.rcc_files(b"zres" + archive[4:]))

"""Run a study, arms × seeds × evaluations, through the real scripts, and compare what it cost and gave.

    python benchmarks/equal_accuracy.py benchmarks/studies/fashion_mnist.yaml --keep docs/results/fashion_mnist

A study is a YAML file:

    flags: {recipe: fashion_mnist_vanilla, epochs: 2, …}      # of main_pretrain.py and its recipes, for all arms
    seeds: [0, 1, 2]                                          # an arm may have its own
    arms:
      vanilla T: {}                                           # what an arm changes
      et_pp T: {curriculum: et_pp, match_flops: vanilla T}    # epochs such that the FLOPs are another arm's
      equal steps: {curriculum: et_pp, match_flops: vanilla T, match_steps: vanilla T}   # … and its steps, by the batch
      from scratch: {pretrain: false, like: vanilla T}        # fine-tuned from random weights, probed as they are
      longer: {branch: vanilla T, curriculum: custom, …}      # goes on where another arm's run of the same seed ended
    evaluate: [{linear_probe: true, knn: true}, {train_images: 6000, epochs: 5}]   # flags of main_finetune.py's calls
    holdout: 10000         # optional: judge on the last 10,000 training images instead of the test images (IDX files)
    beside: [fashion_mnist/vanilla*]                          # optional: runs of other studies, to compare with

The small files of finished runs lie in --keep: each run's in a folder of its own while the study runs, and at the end
all in one runs.zip beside the report, which `mae_et compare` reads as it reads folders. A run that is kept is finished
and needs nothing else, as long as the study says of it what it said then: --keep can be committed and the checkpoints
thrown away, but for those that arms with `like` or `branch` still need. A study can be stopped at any time and goes on
where it was.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, BinaryIO

import tyro
import yaml

from mae_et import files
from mae_et.cli import explain
from mae_et.cli import main as mae_et
from mae_et.compare.runs import ARCHIVE, runs_in
from mae_et.data.sources import count_images, open_source
from mae_et.evaluate.config import FinetuneConfig
from mae_et.plan.build import build_curriculum
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import Curriculum
from mae_et.plan.flags import COMPUTE, from_dict, from_recipe, names, to_dict, to_yaml

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("config.yaml", "environment.json", "ledger.json", "metrics.jsonl")
#: Flags of main_finetune.py that make another evaluation of one whose precision is the same.
JUDGED = names(FinetuneConfig, lambda role: role.judged and role is not COMPUTE)
#: Keys of an arm that are no flags of main_pretrain.py.
STUDY_KEYS = ("match_flops", "match_steps", "pretrain", "like", "branch", "seeds", "evaluate")


@dataclass(frozen=True)
class StudyConfig:
    """Run a study and compare its arms."""

    study: tyro.conf.Positional[Path]
    """YAML file."""
    out: Path = Path("runs/study")
    """Run folders, with checkpoints."""
    keep: Path | None = None
    """Folder for the small files of finished runs; default: OUT/results."""
    arms: tuple[str, ...] = ()
    """Only these arms."""
    seeds: tuple[int, ...] = ()
    """Only these seeds."""
    jobs: int = 1
    """Runs side by side; the cores are shared out among them."""
    discard: bool = False
    """Delete a run's folder, with its checkpoint, when its results are kept, unless another arm needs it."""
    dry_run: bool = False
    """Print what would be run and stop."""


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: str
    seed: int
    flags: dict[str, Any]
    """Of main_pretrain.py; empty: no pretraining."""
    evaluations: dict[str, dict[str, Any]]
    """Flags of main_finetune.py by the name of their result."""
    like: str = ""
    """Without pretraining: the arm whose model is fine-tuned from random weights."""
    branch: str = ""
    """The arm with whose run it begins."""
    matched: tuple[str, ...] = ()
    """Flags that follow from another arm's FLOPs or steps, and so from how FLOPs are counted."""

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '_').replace('/', '-')}-seed{self.seed}"

    @property
    def needs(self) -> str:
        """Name of the job whose run folder it begins with, or "" for none."""
        other = self.branch or self.like
        return replace(self, arm=other).name if other else ""

    @property
    def kept_files(self) -> tuple[str, ...]:
        """Names of the files that say what the run cost and gave."""
        return (*(KEPT if self.flags else KEPT[:2]), *self.evaluations)


def jobs_of(study: dict[str, Any], config: StudyConfig, data_path: str | None) -> list[Job]:
    """All jobs, the first seed of every arm before the second of any. ValueError names an unknown arm or flag."""
    arms = {name: dict(changes or {}) for name, changes in study["arms"].items()}
    check_arms(arms, config)
    plain = {name: {k: v for k, v in changes.items() if k not in STUDY_KEYS} for name, changes in arms.items()}
    flags = {name: study["flags"] | changes for name, changes in plain.items()}
    if data_path:
        flags = {name: values | {"data_path": data_path} for name, values in flags.items()}
    follows = {}
    for name in in_order(arms, config.study):
        follows[name] = matched(flags, name, arms[name])
        flags[name] |= follows[name]
    jobs = []
    for name, changes in arms.items():
        pretrains = changes.get("pretrain", True)
        evaluations = tuple(changes.get("evaluate", study["evaluate"]))
        written = [(name, evaluation) for evaluation in evaluations for name in protocols(evaluation)]
        results = dict(written)
        if len(results) < len(written):
            raise ValueError(f"{config.study}: two evaluations write the same result of {', '.join(results)}")
        for seed in changes.get("seeds", study["seeds"]):
            if (not config.arms or name in config.arms) and (not config.seeds or seed in config.seeds):
                origin = changes.get("like", ""), changes.get("branch", "")
                jobs.append(Job(name, seed, flags[name] if pretrains else {}, results, *origin, tuple(follows[name])))
    for job in jobs:
        if same := [other.arm for other in jobs if other is not job and other.name == job.name]:
            raise ValueError(f"{config.study}: arms {job.arm!r} and {same[0]!r} have the same folder {job.name}")

    def trunks(name: str, before: tuple[str, ...] = ()) -> int:
        if name in before:
            raise ValueError(f"{config.study}: branch: {' of '.join([*before, name])}: an arm can't begin with itself")
        return 1 + trunks(arms[name]["branch"], (*before, name)) if "branch" in arms[name] else 0

    # Runs that others are compared with first; `like` and `branch` need the run they name.
    return sorted(jobs, key=lambda job: (job.seed, bool(job.like), trunks(job.arm)))


def read_study(path: Path) -> dict[str, Any]:
    """A study's YAML file. OSError or ValueError says what is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"STUDY: no file {path}; give a YAML file as in benchmarks/studies")
    study = yaml.safe_load(path.read_text())
    kinds = {"flags": dict, "seeds": list, "arms": dict, "evaluate": list}
    for key, kind in kinds.items():
        if not isinstance(study, dict) or not isinstance(study.get(key), kind):
            raise ValueError(f"{path}: a study needs {', '.join(kinds)}; {key} is missing, or no {kind.__name__}")
    if "recipe" not in study["flags"]:
        raise ValueError(f"{path}: flags: `recipe` is missing, which the arms begin with")
    return study


def check_arms(arms: dict[str, dict[str, Any]], config: StudyConfig) -> None:
    """ValueError that names a reference to no arm."""
    named = [("--arms", name) for name in config.arms]
    for key in ("match_flops", "match_steps", "branch", "like"):
        named += [(f"{config.study}: {key}", changes[key]) for changes in arms.values() if changes.get(key)]
    for what, name in named:
        if name not in arms:
            raise ValueError(f"{what}: no arm {name!r} in {config.study}; choose from {', '.join(arms)}")
    for name, changes in arms.items():
        if changes.get("pretrain", True) == bool(changes.get("like")):
            raise ValueError(
                f"{config.study}: {name}: `pretrain: false` and `like: ARM` go together, or neither is there"
            )


def in_order(arms: dict[str, dict[str, Any]], study: Path) -> list[str]:
    """Names of the arms, each after those whose FLOPs or steps it gets. ValueError names a circle."""
    order: list[str] = []

    def add(name: str, before: tuple[str, ...] = ()) -> None:
        if name in before:
            raise ValueError(f"{study}: match_flops, match_steps: {' like '.join([*before, name])} is a circle")
        for key in ("match_flops", "match_steps"):
            if other := arms[name].get(key):
                add(other, (*before, name))
        order.extend([] if name in order else [name])

    for name in arms:
        add(name)
    return order


def matched(flags: dict[str, dict], name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The flags that give an arm another arm's FLOPs, and its steps."""
    matching: dict[str, Any] = {}
    if other := changes.get("match_flops"):
        config, curriculum = planned(flags[name])
        scale = planned(flags[other])[1].total_flops / curriculum.total_flops
        for share in ("epochs", "warmup_epochs", "hold_epochs"):  # the last two are shares of the first
            matching[share] = round(getattr(config, share) * scale, 4)
    if other := changes.get("match_steps"):
        images = planned(flags[name] | matching)[1].total_images
        matching["batch_size"] = round(images / planned(flags[other])[1].total_steps)
    return matching


def planned(flags: dict[str, Any]) -> tuple[PretrainConfig, Curriculum]:
    """Configuration and curriculum of an arm's flags."""
    base = to_dict(from_recipe(PretrainConfig, flags["recipe"]))
    config = from_dict(PretrainConfig, base | flags, "study")
    return config, build_curriculum(config, count_images(config))


def arguments(flags: dict[str, Any]) -> list[str]:
    """{"norm_pix_loss": True, "mean": [0.5]} -> ["--norm_pix_loss", "--mean", "0.5"]."""
    words: list[str] = []
    for key, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no_{key}")
        else:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_job(job: Job, config: StudyConfig, data_path: str | None, cores: list[int]) -> str:
    """Do whatever of a job is not done yet; returns "" or the problem."""
    folder, kept = config.out / job.name, keep_folder(config) / job.name
    if is_kept(job, kept.parent):
        return ""
    log = config.out / f"{job.name}.log"
    if job.needs and not (config.out / job.needs / "config.yaml").exists():
        return f"it needs the run {config.out / job.needs}, which is not there; take {job.needs} out of {kept.parent}"
    if job.flags and not (folder / "encoder.safetensors").exists():
        recipe = config.out / f"{job.name}.yaml"
        recipe.write_text(to_yaml(planned(job.flags)[0]))
        branch = {"branch": config.out / job.needs} if job.branch else {}
        words = arguments({"recipe": recipe, "seed": job.seed, "output_dir": folder, "resume": "auto"} | branch)
        if problem := script("main_pretrain.py", words, log, cores):
            return problem
    for name, flags in job.evaluations.items():
        if (folder / name).exists():
            continue
        start = {"finetune": str(folder)} if job.flags else {"output_dir": str(folder)}
        if not job.flags:
            start["like"] = str(config.out / job.needs)
        if data_path:
            start["data_path"] = data_path
        tuning = not (flags.get("linear_probe") or flags.get("knn"))
        words = arguments(flags | start | {"seed": job.seed} | ({"resume": "auto"} if tuning else {}))
        if problem := script("main_finetune.py", words, log, cores):
            return problem
    kept.mkdir(parents=True, exist_ok=True)
    for name in job.kept_files:
        (kept / name).write_text(without_places((folder / name).read_text(), config))
    return ""


def without_places(text: str, config: StudyConfig) -> str:
    """Paths below this checkout and --out relative to them: where those lie is nobody's business."""
    for folder in (config.out.resolve(), ROOT):
        text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    return text


def protocols(flags: dict[str, Any]) -> dict[str, FinetuneConfig]:
    """An evaluation's configuration by the name of its result: one, or two of `{linear_probe: true, knn: true}`."""
    config = from_dict(FinetuneConfig, flags | {"finetune": "x"}, "study")
    return {f"eval-{each.protocol}.json": each for each in config.probes or (config,)}


def script(name: str, words: list[str], log: Path, cores: list[int]) -> str:
    """Run one of the project's scripts on some cores; returns "" or its last line."""
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores))}
    with log.open("a") as file:
        print(f"$ python {name} {' '.join(words)}", file=file, flush=True)
        done = subprocess.run(
            [sys.executable, str(ROOT / name), *words],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    return "" if done.returncode == 0 else f"{name} failed: {log.read_text().strip().splitlines()[-1]} (see {log})"


def holdout_folder(study: dict[str, Any], out: Path) -> str | None:
    """IDX files whose test images are the last `holdout` training images, so that tuning never sees the test images."""
    if not study.get("holdout"):
        return None
    folder = out / "holdout"
    path = from_recipe(PretrainConfig, study["flags"]["recipe"]).data_path
    source = open_source(study["flags"].get("data_path", path), "train")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [source.read(i) for i in range(len(source))]
    cut = len(pairs) - study["holdout"]
    for split, part in (("train", pairs[:cut]), ("t10k", pairs[cut:])):
        height, width = part[0][0].shape[:2]
        images = struct.pack(">IIII", 0x803, len(part), height, width) + b"".join(i.tobytes() for i, _ in part)
        labels = struct.pack(">II", 0x801, len(part)) + bytes(int(label) for _, label in part)
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(data, 1))
    return str(folder)


# ── kept results ──


def keep_folder(config: StudyConfig) -> Path:
    return config.keep or config.out / "results"


def is_kept(job: Job, kept: Path) -> bool:
    """Whether all results of a job are there, in a folder or in the archive."""
    run = runs_in(kept).get(job.name) if kept.is_dir() else None
    return run is not None and all((run / name).exists() for name in job.kept_files)


def check_unchanged(job: Job, kept: Path) -> None:
    """ValueError if the study says otherwise of a kept run than it was run with: of what a resumed run must have, too,
    and of what makes another evaluation."""
    if not is_kept(job, kept):
        return
    run, found = runs_in(kept)[job.name], []
    if job.flags:
        held, wanted = yaml.safe_load((run / "config.yaml").read_text()), to_dict(planned(job.flags)[0])
        fixed = [n for n in names(PretrainConfig, lambda role: role.resume) if n not in ("seed", *job.matched)]
        found += [(name, held[name], wanted[name]) for name in fixed if held.get(name) is not None]
    for name, flags in job.evaluations.items():
        held, asked = json.loads((run / name).read_text())["flags"], to_dict(protocols(flags)[name])
        found += [(flag, held.get(flag, asked[flag]), asked[flag]) for flag in flags if flag in JUDGED]
    if changed := [f"--{name} {was}, not {now}" for name, was, now in found if was != now]:
        raise ValueError(f"{run} was run with {', '.join(changed)}: remove it, or --keep elsewhere")


def beside(study: dict[str, Any], results: Path) -> list[str]:
    """Kept runs of other studies that a study is compared with. results: the folder of all studies' --keep."""
    patterns = [pattern.rsplit("/", 1) for pattern in study.get("beside", [])]
    return [
        str(run)
        for other, pattern in patterns
        for name, run in runs_in(results / other).items()
        if fnmatch(name, pattern)
    ]


def pack(kept: Path) -> None:
    """Move the run folders in `kept` into its runs.zip, over archived runs of the same name.

    The folders are deleted once the archive is on the disk.
    """
    with locked(kept):
        unpacked = [run for run in runs_in(kept).values() if isinstance(run, Path)]
        if not unpacked:
            return
        replaced = {run.name for run in unpacked}
        members = {name: content for name, content in archived(kept).items() if name.split("/")[0] not in replaced}
        for run in unpacked:
            files_in = [file for file in run.rglob("*") if file.is_file()]
            members |= {file.relative_to(kept).as_posix(): file.read_bytes() for file in files_in}
        write_archive(kept, members)
        for run in unpacked:
            shutil.rmtree(run)


@contextmanager
def locked(kept: Path) -> Iterator[None]:
    """Another process that changes the archive in `kept` at the same time waits."""
    lock = os.open(kept, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def archived(kept: Path) -> dict[str, bytes]:
    """Files in the runs.zip of `kept`, if there is one, by name."""
    if not (kept / ARCHIVE).is_file():
        return {}
    with zipfile.ZipFile(kept / ARCHIVE) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def write_archive(kept: Path, members: dict[str, bytes]) -> None:
    """Write runs.zip. Equal runs give equal bytes: members are sorted and without their dates."""

    def save(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name in sorted(members):
                member = zipfile.ZipInfo(name)  # of 1 January 1980
                member.create_system, member.external_attr = 3, 0o644 << 16  # or `unzip` makes unreadable files
                archive.writestr(member, members[name], zipfile.ZIP_DEFLATED, 9)

    files.write(kept / ARCHIVE, save)


def main() -> None:
    """Run what is missing, then pack and compare. Exit code 1 if a run failed; the others are done all the same."""
    config = tyro.cli(StudyConfig, use_underscores=True)
    study = read_study(config.study)
    config.out.mkdir(parents=True, exist_ok=True)
    data_path = holdout_folder(study, config.out)
    jobs = jobs_of(study, config, data_path)
    if config.dry_run:
        for job in jobs:
            print(job.name, json.dumps(job.flags))
        return
    for job in jobs:
        check_unchanged(job, keep_folder(config))  # before hours of work
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // config.jobs)
    free: SimpleQueue[list[int]] = SimpleQueue()
    for i in range(config.jobs):
        free.put(cores[i * share : (i + 1) * share] or cores)

    done = {job.name: Event() for job in jobs}
    # Of all arms, run now or not.
    needed = {changes.get(key) for changes in study["arms"].values() if changes for key in ("branch", "like")}

    def work(job: Job) -> str:
        if needed_first := done.get(job.needs):
            needed_first.wait()
        own_cores = free.get()
        try:
            problem = run_job(job, config, data_path, own_cores)
            if config.discard and not problem and job.arm not in needed:
                shutil.rmtree(config.out / job.name, ignore_errors=True)  # not there: was kept before
        finally:
            free.put(own_cores)
            done[job.name].set()
        print(f"{job.name}: {problem or 'done'}", flush=True)
        return problem

    with ThreadPoolExecutor(config.jobs) as pool:
        problems = [problem for problem in pool.map(work, jobs) if problem]
    if problems:
        raise SystemExit(1)
    kept = keep_folder(config)
    pack(kept)
    runs = [str(kept), *beside(study, kept.parent)]
    mae_et(["compare", *runs, "--out", str(kept)])


if __name__ == "__main__":
    explain("equal_accuracy.py", main)

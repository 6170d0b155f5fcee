"""Run folders for tests of comparisons, with figures that a test chooses: nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from mae_et.evaluate.config import FinetuneConfig
from mae_et.plan.config import PretrainConfig
from mae_et.plan.flags import to_dict, to_yaml

SMALL = {"input_size": 32, "patch_size": 8, "epochs": 4}


def write_run(folder: Path, seed=0, flops=1e12, top1=80.0, seconds=100.0, protocol="knn", **changes) -> Path:
    """A run folder as pretraining and an evaluation leave it, with the given figures."""
    stages = changes.pop("stage_sizes", [32])
    environment = {"device": "cpu", "devices": 1, "precision": "bf16", "num_images": 1000, "packages": {"torch": "2"}}
    environment |= changes.pop("environment", {})
    p = changes.pop("p", 1.0)
    flags = to_dict(FinetuneConfig(finetune=str(folder), knn=True, k=changes.pop("k", 20)))
    eval_images = changes.pop("eval_images", 500)
    config = PretrainConfig(**(SMALL | changes), seed=seed)
    cost = {
        "steps": 10,
        "images": 640,
        "visible_patches": 640 * 4,
        "predicted_patches": 640 * 12,
        "flops": flops / len(stages),
        "train_seconds": 0.9 * seconds / len(stages),
        "data_seconds": 0.1 * seconds / len(stages),
        "eval_seconds": 1.0,
        "warmup_seconds": 1.0,
        "peak_memory_bytes": 2**30,
    }
    costs = [{"size_px": size} | cost for size in stages]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "ledger.json").write_text(json.dumps({"stages": costs}))
    points = [{"step": i, "p": p * (i + 1) / 10, "loss": 1 / (i + 1)} for i in range(10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    result = {"protocol": protocol, "top1": top1, "num_images": eval_images, "flags": flags}
    (folder / f"eval-{protocol}.json").write_text(json.dumps(result))
    return folder


def write_untrained(folder: Path, top1=20.0, **flags) -> Path:
    """A run folder as an evaluation from random weights leaves it."""
    config = FinetuneConfig(**flags)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "environment.json").write_text("{}")
    result = {"protocol": config.protocol, "top1": top1, "num_images": 500, "flags": to_dict(config)}
    (folder / f"eval-{config.protocol}.json").write_text(json.dumps(result))
    return folder


def evaluate_again(run: Path, protocol: str, top1: float) -> None:
    """Another evaluation of a run, with the flags of its kNN."""
    result = json.loads((run / "eval-knn.json").read_text())
    (run / f"eval-{protocol}.json").write_text(json.dumps(result | {"protocol": protocol, "top1": top1}))

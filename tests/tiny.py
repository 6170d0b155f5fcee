"""Tiny models, runs and helpers that several test modules share; fixtures are in conftest.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mae_et import checkpoint
from mae_et.plan.config import PretrainConfig
from mae_et.plan.flags import from_dict

ROOT = Path(__file__).parent.parent
#: A pretraining run of two stages.
TINY = {
    "model": "mae_vit_tiny_patch16",
    "input_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "curriculum": "custom",
    "stages": [{"size_px": 16, "share": 0.5, "crop_scale": [0.5, 1.0]}, {"size_px": 32, "share": 0.5}],
    "epochs": 2,
    "warmup_epochs": 0.5,
    "batch_size": 6,
    "num_workers": 0,
    "precision": "fp32",
    "lr": 1e-3,
    "device": "cpu",
    "print_steps": 3,
}
#: An encoder and decoder for evaluations.
SHAPE = {
    "img_size": 16,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
#: An evaluation that takes seconds.
QUICK = {"device": "cpu", "precision": "fp32", "num_workers": 0, "batch_size": 6, "epochs": 2, "lr": 1e-3}


def tiny(photos: Path, out: Path, **changes) -> PretrainConfig:
    return from_dict(PretrainConfig, TINY | {"data_path": str(photos), "output_dir": str(out)} | changes, "test")


def write_photos(folder: Path, count: int) -> Path:
    """Small smooth images, flat and unlabelled."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (2, 3, 3), dtype=np.uint8))
        small.resize((60, 48), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


def script(*flags: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "main_pretrain.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **kwargs
    )


def recipe_file(config: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoint.pt")["model"]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def assert_close(folder: Path, whole: Path, same_lines: bool = True) -> None:
    """Weights, losses, gradients and counts of a run on several ranks are those of one process, up to rounding."""
    one, two = weights(whole), weights(folder)
    for key in one:
        if not key.endswith("qkv.bias"):  # its key part has no gradient but rounding noise, which Adam scales up
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5, msg=key)
    records = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, folder)]
    for name, tolerance in (
        (("loss", 1e-5), ("grad_norm", 1e-3)) if same_lines else ()
    ):  # Adam would hide a gradient that is off by a factor
        theirs, ours = ([record[name] for record in run] for run in records)
        assert ours == pytest.approx(theirs, rel=tolerance), name
    ledgers = [json.loads((f / "ledger.json").read_text())["total"] for f in (whole, folder)]
    assert ledgers[0]["images"] == ledgers[1]["images"] and ledgers[0]["flops"] == ledgers[1]["flops"]


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)

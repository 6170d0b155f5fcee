"""Online quality: kNN and RankMe against NumPy, and a run that is the same with them and without."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from tiny import assert_same, tiny, weights, write_photos

from mae_et import checkpoint
from mae_et.cli import main_pretrain
from mae_et.data.sources import open_held_out
from mae_et.engine import runtime
from mae_et.engine.features import knn_scores, rank_me
from mae_et.engine.online import NEIGHBOURS, TEMPERATURE, OnlineProbe
from mae_et.engine.pretrain import pretrain
from mae_et.engine.run import PretrainRun
from mae_et.evaluate.config import FinetuneConfig
from mae_et.plan.config import PretrainConfig


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[dict]:
    """What does not depend on the clock, of the records that have a quality."""
    kept = ("step", "p", "knn_cls", "knn_mean", "rankme_cls", "rankme_mean")
    return [{k: record[k] for k in kept if k in record} for record in records(folder) if "rankme_mean" in record]


def test_leave_one_out_is_a_loop_over_the_others() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    x = (rng.normal(size=(60, 8)) + 2 * np.eye(8)[labels]).astype(np.float32)
    scores = knn_scores(torch.from_numpy(x), torch.from_numpy(labels), None, 4, k=5, temperature=0.07)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for i in range(60):
        others = [j for j in range(60) if j != i]
        nearest = sorted(others, key=lambda j: -(unit[i] @ unit[j]))[:5]
        votes = np.zeros(4)
        for j in nearest:
            votes[labels[j]] += np.exp(unit[i] @ unit[j] / 0.07)
        np.testing.assert_allclose(scores[i] / scores[i].sum(), votes / votes.sum(), rtol=1e-3)


def test_leave_one_out_in_chunks_leaves_out_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is its own nearest neighbour: with k = 1 its label must never be found by itself."""
    x, labels = torch.eye(6) + 0.1, torch.arange(6)
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda tensor, _: split(tensor, 4))
    assert not (knn_scores(x, labels, None, 6, k=1, temperature=0.07).argmax(1) == labels).any()


@pytest.mark.parametrize("shape", [(50, 6), (6, 50)])
def test_rank_me_is_the_papers(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(1).normal(size=shape) @ np.diag(0.5 ** np.arange(shape[1]))
    values = np.linalg.svd(x, compute_uv=False)
    p = values / values.sum() + 1e-7
    assert rank_me(torch.from_numpy(x).float()) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_rank_me_counts_equal_directions() -> None:
    assert rank_me(torch.eye(7)) == pytest.approx(7, rel=1e-4)
    assert rank_me(torch.ones(9, 4)) == pytest.approx(1, rel=1e-4)


def test_neighbours_are_those_of_the_evaluation() -> None:
    assert (FinetuneConfig().k, FinetuneConfig().temperature) == (NEIGHBOURS, TEMPERATURE)


@pytest.fixture(scope="module")
def probed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, Path]:
    """A run on labelled images that measures itself at every fifth of its compute and keeps all its checkpoints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("probed") / "run"
    quality = {"holdout": 9, "probe_every": 0.2, "save_steps": 1, "keep_checkpoints": 99}
    config = tiny(pictures, out, **quality)
    folder = pretrain(config)
    torch.set_num_threads(threads)
    return config, folder


def test_quality_is_measured_at_shares_of_the_compute_and_its_cost_is_apart(probed) -> None:
    _, folder = probed
    found = curve(folder)
    assert len(found) == 5 and found[-1]["p"] == 1
    every_step = [record["p"] for record in records(folder)]
    for share, record in zip((0.2, 0.4, 0.6, 0.8, 1), found, strict=True):
        assert record["p"] == min(p for p in every_step if p >= share - 1e-9)
        assert 0 <= record["knn_mean"] <= 100 and 1 <= record["rankme_cls"] <= 9
    total = json.loads((folder / "ledger.json").read_text())["total"]
    tokens, width, depth = 17, 24, 2  # 32 px in patches of 8, and a class token
    block = 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)
    assert total["probe_flops"] == 5 * 9 * (depth * block + 2 * 16 * 192 * width)
    assert total["probe_seconds"] > 0


@pytest.mark.usefixtures("one_thread")
def test_training_is_the_same_without_it(probed, tmp_path: Path) -> None:
    config, folder = probed
    plain = pretrain(replace(config, probe_every=0.0, output_dir=str(tmp_path / "run"), keep_checkpoints=1))
    assert_same(weights(plain), weights(folder))
    assert not curve(plain)
    for with_it, without in zip(records(folder), records(plain), strict=True):
        assert with_it["loss"] == without["loss"] and with_it["flops"] == without["flops"]


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_has_the_same_curve(probed, tmp_path: Path) -> None:
    """From just before the third measurement, which the older run has made and reported."""
    config, folder = probed
    whole, run = curve(folder), tmp_path / "run"
    shutil.copytree(folder, run)
    saved = {checkpoint.load(path)["step"]: path for path in run.glob("checkpoint*.pt")}
    wanted = saved.pop(whole[2]["step"])
    for path in saved.values():
        path.unlink()
    wanted.rename(run / "checkpoint.pt")
    pretrain(replace(config, output_dir=str(run), resume="auto", keep_checkpoints=1, save_steps=0))
    assert curve(run) == whole
    costs = [json.loads((each / "ledger.json").read_text())["total"]["probe_flops"] for each in (run, folder)]
    assert costs[0] == costs[1]


def measured(config: PretrainConfig, out: Path) -> None:
    """Quality of initial weights, whole and sharded, into out/{fsdp}.json."""
    with runtime.start(config.device, config.precision) as rt:
        for fsdp in (False, True):
            run = PretrainRun.create(replace(config, fsdp=fsdp), rt, num_images=15)
            quality = OnlineProbe(run).measure(run, 0)
            if rt.is_main:
                (out / f"{fsdp}.json").write_text(json.dumps(quality))


@pytest.mark.usefixtures("one_thread")
def test_ranks_measure_what_one_process_does(probed, tmp_path: Path) -> None:
    """Two ranks that share 9 images out, and two that share the model out."""
    config, outs = probed[0], [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        out.mkdir()
    measured(config, outs[0])
    on_ranks(2, tmp_path / "log", measured, config, outs[1])
    for name in ("False.json", "True.json"):
        one, two = (json.loads((out / name).read_text()) for out in outs)
        assert two == pytest.approx(one, rel=1e-4) and len(one) == 4


def test_without_labels_it_is_the_rank_alone(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pretrain(tiny(photos, tmp_path / "run", epochs=0.5, holdout=8, probe_every=1.0))
    (last,) = curve(folder)
    assert "knn_mean" not in last and 1 <= last["rankme_mean"] <= 8
    assert "RankMe" in capsys.readouterr().out


def test_damaged_images_that_are_kept_out_end_the_run_before_it_trains(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    config = tiny(write_photos(data, 12), out, holdout=8, probe_every=1.0)
    Path(open_held_out(config.data_path, config.holdout).name(3)).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 of 8 images are damaged, more than --damaged_limit 0\.01"):
        pretrain(config)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"), [([], "give --holdout"), (["--holdout", "1"], "--holdout 1 is too few images")]
)
def test_it_needs_images_that_are_kept_out(photos, tmp_path, capsys, flags, message) -> None:
    words = ["--data_path", str(photos), "--output_dir", str(tmp_path / "run"), "--probe_every", "0.5", *flags]
    words += ["--model", "mae_vit_tiny_patch16", "--decoder_depth", "1", "--num_workers", "0"]
    with pytest.raises(SystemExit) as end:
        main_pretrain(words)
    error = capsys.readouterr().err
    assert end.value.code == 1 and message in error and len(error.splitlines()) == 1

"""Fine-tuning: who learns how fast, where weights and positions come from, exact resume, and mistakes in one line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from tiny import QUICK, SHAPE

from mae_et import checkpoint
from mae_et.data.datasets import _class_names
from mae_et.data.labelled import Augmentation, TrainCrops, eval_batches, labelled_batches, seeded
from mae_et.data.loader import CorruptLog
from mae_et.data.sources import open_source
from mae_et.data.stream import Sample, SampleStream
from mae_et.data.workers import Loading
from mae_et.engine import run_folder, sharded
from mae_et.engine import step as step_module
from mae_et.engine.runtime import Runtime
from mae_et.evaluate import finetune as finetune_module
from mae_et.evaluate.augmentation import augmentation, mixed, mixing
from mae_et.evaluate.classes import with_classes
from mae_et.evaluate.config import FinetuneConfig
from mae_et.evaluate.encoder import adapt_positions, build_classifier, load_encoder
from mae_et.evaluate.finetune import finetune
from mae_et.evaluate.probe import probe
from mae_et.evaluate.run import FinetuneRun, layer_decay_adamw
from mae_et.model import MaskedAutoencoder, sincos_table
from mae_et.plan.curriculum import Curriculum, Stage
from mae_et.plan.flags import parse

pytestmark = pytest.mark.usefixtures("one_thread")  # these tensors are too small to share out
PLAIN = {"mixup": 0, "cutmix": 0, "reprob": 0, "aa": "none", "drop_path": 0}


@pytest.mark.parametrize("pooled", [True, False])
def test_each_depth_has_its_own_learning_rate_and_every_parameter_one_group(run: Path, pooled: bool) -> None:
    config = FinetuneConfig(finetune=str(run), layer_decay=0.5)
    model = build_classifier(load_encoder(config), 3, pooled)
    groups = layer_decay_adamw(model, config).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            wanted = 0.5 ** (SHAPE["depth"] - int(name.split(".")[1]))
        elif name.startswith(("cls_token", "pos_embed", "patch_embed")):
            wanted = 0.5 ** (SHAPE["depth"] + 1)
        else:
            wanted = 0.5 if name.startswith("norm.") else 1
        assert scale[id(parameter)] == wanted, name
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    matrices = {id(p) for n, p in model.named_parameters() if p.ndim > 1 and n not in ("cls_token", "pos_embed")}
    assert decayed == matrices


def test_the_classifier_sees_what_the_pretrained_encoder_sees(run: Path) -> None:
    start = load_encoder(FinetuneConfig(finetune=str(run)))
    assert (start.mean, start.std, start.folder) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), run)
    autoencoder = MaskedAutoencoder(**SHAPE | {"target_dim": 192})
    autoencoder.load_state_dict(checkpoint.load(run / "checkpoint.pt")["model"])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        token = build_classifier(start, 0, pooled=False).eval()(images)
        torch.testing.assert_close(token, autoencoder.encode(images)[:, 0])
        model = build_classifier(start, 50, pooled=True)
    assert 1e-5 < model.head.weight.std() < 3e-5
    assert (model.head.bias == 0).all()
    assert model.fc_norm.weight.shape == (16,)


def test_fixed_positions_are_evaluated_and_learned_ones_resampled_on_any_grid() -> None:
    old, new = (2, 3), (4, 5)
    fixed = torch.cat([torch.full((1, 16), 7.0), sincos_table(16, old, old)])[None]
    moved = adapt_positions(fixed, old, new)
    torch.testing.assert_close(moved[0, 1:], sincos_table(16, new, old))
    assert (moved[0, 0] == 7).all()
    rows = torch.arange(2.0).repeat_interleave(3)[:, None].expand(-1, 16)  # learned: grows from row to row
    learned = torch.cat([torch.zeros(1, 16), rows])[None]
    grid = adapt_positions(learned, old, new)[0, 1:].view(4, 5, 16)
    assert (grid.diff(dim=0) > 0).all()
    torch.testing.assert_close(grid, grid[:, :1].expand_as(grid))
    assert adapt_positions(learned, old, old) is learned


def test_fine_tuning_learns_reports_and_its_checkpoint_evaluates_to_the_same(run: Path, pictures: Path) -> None:
    config = FinetuneConfig(
        **{"finetune": str(run), "input_size": (16, 24), "report": True, "model_ema": True, "model_ema_decay": 0.5},
        **PLAIN | QUICK | {"epochs": 15, "lr": 5e-3},
    )
    result = json.loads(finetune(config).read_text())
    assert (run / "eval-finetune.json").is_file()
    assert result["top1"] > 90  # chance is 33
    assert "top5" not in result  # three classes
    assert result["num_images"] == 12
    assert sum(map(sum, result["confusion"])) == 12
    assert set(result["per_class_accuracy"]) == {"red", "green", "blue"}
    assert result["ema_top1"] > 60
    assert result["cost"]["flops"] > result["training"]["flops"] > 0
    assert result["flags"]["epochs"] == 15
    assert result["environment"]["packages"]["timm"]
    again = finetune(FinetuneConfig(eval=True, finetune=str(run / "finetune"), **QUICK | {"epochs": None}))
    assert json.loads(again.read_text())["top1"] == result["top1"]
    assert again.name == "eval-finetuned.json"
    lines = [json.loads(line) for line in (run / "finetune/metrics.jsonl").read_text().splitlines()]
    assert [round(line["epoch"]) for line in lines] == list(range(1, 16))


def test_a_killed_run_resumes_bit_for_bit(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything random on: augmentation, erasing, mixing, drop path, and an average of the weights; and with the
    newest checkpoint cut short, so that it goes on from the one before."""
    config = FinetuneConfig(finetune=str(run), mixup_mode="elem", model_ema=True, save_steps=2, **QUICK)
    whole, cut = (replace(config, output_dir=str(tmp_path / name)) for name in ("whole", "cut"))
    finetune(whole)
    step = step_module.guarded_step
    taken = []

    def dies(*arguments) -> None:
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(step_module, "guarded_step", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune(cut)
    monkeypatch.undo()
    newest = tmp_path / "cut/checkpoint.pt"
    assert checkpoint.load(newest)["step"] == 4
    newest.write_bytes(newest.read_bytes()[:-100])
    content, before = sharded.load_newest(newest)
    assert (content["step"], before.name) == (2, "checkpoint.prev1.pt")
    torch.manual_seed(123)
    finetune(replace(cut, resume="auto", save_steps=0))
    states = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut")]
    for part in (lambda s: s["model"], lambda s: s["head"], lambda s: s["ema"]["model"]):
        ours, theirs = map(part, states)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(ValueError, match=r"of another configuration: smoothing was 0.1, is 0.2"):
        finetune(replace(cut, resume="auto", smoothing=0.2))
    with pytest.raises(FileExistsError, match=r"whole already holds a run \(checkpoint.pt\)"):
        finetune(replace(whole, resume=str(newest)))
    others = shutil.copytree(pictures, tmp_path / "others")
    for path in others.glob("train/*/*.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    with pytest.raises(ValueError, match=r"trained on other images than those of .*others"):
        finetune(replace(cut, resume="auto", data_path=str(others)))


def signal_in_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM in a step, counted from 1, of the next run."""
    step, taken = step_module.guarded_step, []

    def signalled(*arguments) -> None:
        step(*arguments)
        taken.append(1)
        if len(taken) == number:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(step_module, "guarded_step", signalled)


def test_sigterm_saves_and_the_run_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FinetuneConfig(finetune=str(run), **QUICK)
    whole, cut = (replace(config, output_dir=str(tmp_path / name)) for name in ("whole", "cut"))
    finetune(whole)
    signal_in_step(3, monkeypatch)
    with pytest.raises(SystemExit, match="143"):
        finetune(cut)
    monkeypatch.undo()
    state = checkpoint.load(tmp_path / "cut/checkpoint.pt")
    assert state["step"] in (3, 4)
    state["ledger"]["stages"][0]["train_seconds"] += 1000
    checkpoint.save(state, tmp_path / "cut/checkpoint.pt")
    result = json.loads(finetune(replace(cut, resume="auto")).read_text())
    assert 1000 < result["cost"]["seconds"] < 1100, "of the whole run, as its FLOPs"
    ours, theirs = (checkpoint.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_accumulation_and_ranks_do_not_change_the_step(run: Path, tmp_path: Path) -> None:
    common = PLAIN | QUICK | {"finetune": str(run), "total_batch_size": 8, "epochs": 1}
    for name, micro in (("one", 8), ("three", 3)):
        finetune(FinetuneConfig(**common | {"batch_size": micro, "output_dir": str(tmp_path / name)}))
    config = FinetuneConfig(**common | {"batch_size": 3, "output_dir": str(tmp_path / "ranks")})
    on_ranks(2, tmp_path / "log", finetune, config)
    one, *others = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("one", "three", "ranks"))
    for other in others:
        for key, tensor in one["model"].items():
            torch.testing.assert_close(other["model"][key], tensor, atol=2e-5, rtol=1e-4)
    results = [json.loads((tmp_path / name / "eval-finetune.json").read_text()) for name in ("one", "ranks")]
    assert results[0]["num_images"] == results[1]["num_images"] == 12


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_training_crop_is_a_function_of_seed_and_sample_number(channels: int) -> None:
    class Noise:
        classes, labels = ["a"], np.zeros(2, dtype=np.int64)

        def __len__(self) -> int:
            return 2

        def read(self, index: int) -> tuple[np.ndarray, int]:
            return np.random.default_rng(index).integers(0, 256, (30, 30, channels), dtype=np.uint8), 0

    policy = augmentation(FinetuneConfig(finetune="x", reprob=1.0), channels)
    assert bool(policy.policy) == (channels != 4)
    crops = TrainCrops(Noise(), (16, 24), [0.5] * channels, [0.25] * channels, policy, seed=1)
    first = crops[Sample(0, 10, 0)][0]
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(crops[Sample(0, 10, 0)][0], first)
    assert not torch.equal(crops[Sample(0, 11, 0)][0], first)
    assert (first.shape, first.dtype) == ((channels, 16, 24), torch.float32)
    plain = TrainCrops(Noise(), (16, 24), [0.5] * channels, [0.25] * channels, Augmentation((0.08, 1.0)), seed=1)
    assert -2 <= plain[Sample(0, 10, 0)][0].min() < plain[Sample(0, 10, 0)][0].max() <= 2  # normalised pixels


@pytest.mark.parametrize("area", [1.0, 0.25])
def test_crops_of_fine_tuning_have_the_area_that_is_asked_for(area: float) -> None:
    """Of an image whose two channels say where a pixel is; all of it, upright or mirrored, where that is asked for."""
    y, x = np.mgrid[0:200, 0:200].astype(np.uint8)

    class Ramps:
        def __len__(self) -> int:
            return 1

        def read(self, index: int) -> tuple[np.ndarray, int]:
            return np.stack([x, y], axis=-1), 0

    chosen = augmentation(FinetuneConfig(finetune="x", crop_scale=(area, area), reprob=0), 2)
    crops = TrainCrops(Ramps(), (40, 40), [0.0] * 2, [1 / 255] * 2, chosen, seed=1)
    for number in range(20):
        crop = crops[Sample(0, number, 0)][0]
        width, height = ((channel.max() - channel.min()) / 195 for channel in crop)  # of 200, less half a pixel a side
        assert width * height == pytest.approx(area, rel=0.06)


@pytest.mark.parametrize("flag", ["smoothing", "drop_path", "model_ema_decay"])
def test_a_share_that_leaves_nothing_to_learn_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=rf"--{flag} must be in \[0, 1\), got 1"):
        FinetuneConfig(finetune="x", **{flag: 1.0})


def test_an_impossible_area_of_crops_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--crop_scale must be two areas 0 < low <= high <= 1, got 0 1"):
        FinetuneConfig(finetune="x", crop_scale=(0, 1))


@pytest.mark.parametrize("policy", ["rand-m10-mstd0.5-inc1", "rand-m1", "original", "v0", "augmix-m9"])
def test_policies_survive_their_own_ends(pictures: Path, policy: str) -> None:
    """Where timm asks Pillow to posterise to no bits, which it refuses."""
    chosen = augmentation(FinetuneConfig(finetune="x", aa=policy), 3)
    crops = TrainCrops(open_source(pictures), (16, 16), [0.5] * 3, [0.25] * 3, chosen, seed=1)
    for number in range(150 if policy.startswith("rand") else 40):
        crops[Sample(0, number, 0)]


@pytest.mark.parametrize("size", [1, 5, 6])
def test_mixing_takes_any_number_of_images_and_keeps_targets_whole(size: int) -> None:
    mix = mixing(FinetuneConfig(finetune="x", smoothing=0.1), 4)
    images, labels = torch.arange(size * 12.0).view(size, 3, 2, 2), torch.arange(size) % 4
    with seeded(3):
        some, targets = mixed(mix, images.clone(), labels)
    with seeded(3):
        again, _ = mixed(mix, images.clone(), labels)
    assert torch.equal(some, again)
    assert some.shape == images.shape
    torch.testing.assert_close(targets.sum(1), torch.ones(size))
    off, smooth = mixed(mix, images.clone(), labels, enabled=False)
    assert torch.equal(off, images)
    torch.testing.assert_close(smooth, torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.025)


def test_the_commands_of_finetune_md_mean_what_they_meant() -> None:
    command = (
        "--accum_iter 4 --batch_size 32 --model vit_base_patch16 --finetune base.pth --epochs 100 --blr 5e-4 "
        "--layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval "
        "--data_path imagenet --no_pin_mem --clip_grad 1 --aa rand-m9-mstd0.5-inc1 --remode pixel --nb_classes 1000 "
        "--job_dir out --nodes 4 --ngpus 8 --use_volta32 --cls_token --cutmix_minmax 0.2 0.8 --start_epoch 0"
    )
    config = parse(FinetuneConfig, command.split())
    assert (config.total_batch(10**6, 8), config.peak_lr(1024), config.warmup_epochs) == (1024, 2e-3, 5)
    assert not config.pooled
    assert not config.pin_mem
    bare = parse(FinetuneConfig, ["--finetune", "base.pth"])
    assert bare.pooled
    assert (bare.epochs, bare.blr, bare.total_batch(10**6, 8), bare.min_lr) == (100, 5e-4, 1024, 1e-6)
    probe = parse(FinetuneConfig, ["--finetune", "base.pth", "--linear_probe"])
    assert (probe.epochs, probe.peak_lr(probe.total_batch(10**6, 1)), probe.weight_decay) == (90, 6.4, 0)
    assert not probe.pooled


def test_it_trains_from_scratch_and_like_a_run(run: Path, pictures: Path, tmp_path: Path) -> None:
    quick = QUICK | {"epochs": 1, "data_path": str(pictures)}
    named = FinetuneConfig(**quick, model="vit_tiny_patch16", embed_dim=16, depth=1, num_heads=2, patch_size=8,
                           input_size=16, output_dir=str(tmp_path / "named"))  # fmt: skip
    assert json.loads(finetune(named).read_text())["origin"] == "scratch"
    like = FinetuneConfig(**quick, like=str(run), output_dir=str(tmp_path / "like"))
    assert not torch.equal(
        load_encoder(like).state["encoder.blocks.0.attn.qkv.weight"],
        checkpoint.load(run / "checkpoint.pt")["model"]["encoder.blocks.0.attn.qkv.weight"],
    )
    assert load_encoder(like).shape["embed_dim"] == 16


def test_without_held_out_images_evaluation_is_skipped_and_said(
    run: Path, pictures: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(pictures / "train")
    folder = finetune(FinetuneConfig(finetune=str(run), data_path=str(tmp_path / "data"), **QUICK | {"epochs": 1}))
    assert folder == run / "finetune"
    assert "evaluation is skipped" in capsys.readouterr().out
    assert not list(run.rglob("eval-*.json"))


def test_fewer_labels_are_balanced_and_the_same_each_time(run: Path) -> None:
    path = finetune(FinetuneConfig(finetune=str(run), train_images=6, eval_images=3, **QUICK | {"epochs": 1}))
    assert path.name == "eval-finetune-6-of-3.json"
    result = json.loads(path.read_text())
    assert (result["train_images"], result["num_images"]) == (6, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_probe": True, "layer_decay": 0.7}, "--linear_probe keeps the backbone .* contradicts --layer_decay"),
        ({"knn": True, "eval": True}, "--knn and --eval contradict each other"),
        ({"global_pool": True, "cls_token": True}, "--global_pool and --cls_token contradict each other"),
        ({"finetune": "nowhere.pt"}, "nowhere.pt: no such file or timm model"),
        ({"finetune": ""}, "--model or --like must say what to train"),
        ({"model": "vit_base_patch16"}, r"embed_dim 768.* another architecture than mae_et checkpoint .*embed_dim 16"),
        ({"nb_classes": 5}, "--nb_classes 5, but .* has 3 classes"),
        ({"eval": True}, "has no classifier to --eval"),
        ({"input_size": 20}, "size 20 px is not divisible by the patch"),
        ({"aa": "nonsense"}, "--aa nonsense: not a policy of timm"),
        ({"aa": "3ar"}, "--aa 3ar: not a policy of timm"),
        ({"aa": "rand-m9.5.5"}, "--aa rand-m9.5.5: not a policy of timm"),
        ({"aa": "rand-n1.5"}, "--aa rand-n1.5: not a policy of timm"),
        ({"aa": "augmix-n2"}, "--aa augmix-n2: not a policy of timm"),
        ({"aa": "rand-m9-foo1"}, "--aa rand-m9-foo1: not a policy of timm"),
        ({"aa": "rand-foo"}, "--aa rand-foo: not a policy of timm"),
        ({"remode": "pixels"}, r"unknown --remode 'pixels' \(did you mean pixel\?\)"),
        ({"epochs": 1, "warmup_epochs": 2}, "--warmup_epochs 2 is longer than --epochs 1"),
        ({"train_images": 99}, "--train_images 99: .* has 24"),
        ({"mean": (0.5,)}, "--mean has 1 numbers for 3 channels"),
        ({"mean": (0, float("nan"), 0)}, "--mean must be finite, got 0 nan 0"),
        ({"std": (0.2, float("nan"), 0.2)}, "--std must be positive and finite, got 0.2 nan 0.2"),
        ({"resume": "nowhere"}, "--resume nowhere: no checkpoint there"),
    ],
)
def test_mistakes_are_explained_in_one_line(run: Path, changes: dict, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        finetune(FinetuneConfig(**{"finetune": str(run)} | QUICK | changes))
    assert "\n" not in str(error.value)


def test_data_without_labels_or_with_other_classes_are_refused(run: Path, pictures: Path, tmp_path: Path) -> None:
    flat, uneven = tmp_path / "flat", tmp_path / "uneven"
    flat.mkdir()
    (flat / "0.png").symlink_to(pictures / "train/red/0.png")
    with pytest.raises(ValueError, match=r"flat .*has no labels"):
        finetune(FinetuneConfig(finetune=str(run), data_path=str(flat), **QUICK))
    (uneven / "val/grey").mkdir(parents=True)
    (uneven / "train").symlink_to(pictures / "train")
    (uneven / "val/grey/0.png").symlink_to(pictures / "val/red/0.png")
    with pytest.raises(ValueError, match=r"class folders grey of .* are not in"):
        finetune(FinetuneConfig(finetune=str(run), data_path=str(uneven), **QUICK))
    assert len(open_source(pictures, "val").classes) == 3
    with pytest.raises(ValueError, match="is the pretraining run itself"):
        finetune(FinetuneConfig(finetune=str(run), output_dir=str(run), overwrite=True, **QUICK))
    assert (run / "checkpoint.pt").is_file()


class Asked(torch.utils.data.Dataset):
    """Whether the process that reads an item ignores signals, as an image, with a label."""

    image_bytes = 2

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)]
        return torch.tensor(ignored), 0


class AskedInTraining(Asked):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, list]:
        return *super().__getitem__(index), []


def test_loader_processes_leave_signals_to_the_trainer() -> None:
    """Who signals the whole process group means a run to save and end, not to lose its loader."""
    stream = SampleStream(Curriculum((Stage(16, 4, 0, 2, 1),), 4), 0, 2)
    ((trained, _),) = labelled_batches(AskedInTraining(), stream, CorruptLog(4, 0.0), Loading(1))
    evaluated = [images for images, _ in eval_batches(Asked(), 0, 1, Loading(1), batch_size=2)]
    assert trained.all() and torch.cat(evaluated).all()


def test_judging_on_what_pretraining_has_seen_is_said(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_encoder(FinetuneConfig(finetune=str(run), holdout=3))
    assert "--holdout 3: mae_et checkpoint" in caplog.text and "was pretrained with --holdout 0" in caplog.text
    caplog.clear()
    load_encoder(FinetuneConfig(finetune=str(run)))
    load_encoder(FinetuneConfig(like=str(run), holdout=3))  # none of its weights
    load_encoder(FinetuneConfig(finetune=str(run), holdout=3, data_path="elsewhere"))
    assert not caplog.text


@pytest.mark.parametrize(("every", "ends"), [(1, [3, 7, 10, 14]), (2, [7, 14]), (3, [10, 14]), (0.01, range(1, 15))])
def test_evaluations_are_at_the_steps_nearest_to_whole_epochs(run: Path, every: float, ends: list[int]) -> None:
    """24 images in batches of 7 are 3.43 steps an epoch: every third step would be one evaluation more, and drift."""
    finetune(FinetuneConfig(finetune=str(run), **QUICK | {"batch_size": 7, "epochs": 4, "eval_epochs": every}))
    lines = [json.loads(line) for line in (run / "finetune/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] + 1 for line in lines] == list(ends)


def test_the_loss_that_is_reported_is_the_mean_since_the_last_evaluation(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, losses = step_module.accumulate_gradients, []

    def recorded(*arguments):
        loss = real(*arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(step_module, "accumulate_gradients", recorded)
    config = FinetuneConfig(finetune=str(run), output_dir=str(tmp_path / "tuned"), **QUICK)
    folder = tmp_path / "tuned"
    finetune(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [line["step"] + 1 for line in lines]
    assert ends[-1] == len(losses) and ends[0] > 1 and len(ends) > 1
    for line, begin, end in zip(lines, [0, *ends], ends, strict=False):
        assert line["loss"] == pytest.approx(sum(losses[begin:end]) / (end - begin), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = step_module.accumulate_gradients, []

    def broken(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(step_module, "accumulate_gradients", broken)
    config = FinetuneConfig(finetune=str(run), output_dir=str(tmp_path / "tuned"), **QUICK)
    with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
        finetune(config)
    assert len(calls) == 3


def test_auto_begins_again_where_the_first_try_died_before_its_first_checkpoint(run: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "metrics.jsonl").write_text('{"step": 0, "loss": 9.0}\n{"st')
    finetune(FinetuneConfig(finetune=str(run), output_dir=str(tmp_path / "tuned"), resume="auto", **QUICK))
    lines = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 7]


def spoiled(pictures: Path, folder: Path, count: int) -> Path:
    shutil.copytree(pictures, folder)
    for path in sorted(folder.glob("val/*/*.png"))[:count]:
        path.write_bytes(path.read_bytes()[:60])
    return folder


def test_a_damaged_held_out_picture_is_left_out_or_refused_before_training(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It used to end fine-tuning after the last epoch with nothing saved."""
    data = spoiled(pictures, tmp_path / "data", 1)
    config = FinetuneConfig(finetune=str(run), data_path=str(data), output_dir=str(tmp_path / "tuned"), **QUICK)
    with pytest.raises(
        ValueError, match=r"1 of 12 images are damaged, more than --damaged_limit 0.01; the last is .*val"
    ):
        finetune(config)
    assert not (tmp_path / "tuned").exists()  # nothing was trained
    capsys.readouterr()
    result = json.loads(finetune(replace(config, damaged_limit=0.1)).read_text())
    assert result["num_images"] == 11
    assert capsys.readouterr().out.count("damaged image skipped (1 so far)") == 1
    for flags in ({"knn": True, "k": 3}, {"linear_probe": True}):
        (judged,) = probe(replace(config, damaged_limit=0.1, output_dir="", **flags)).values()
        assert judged["num_images"] == 11


def test_what_was_trained_is_saved_before_an_evaluation_that_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run that goes on evaluates first, so that it ends as if nothing had happened."""
    config = FinetuneConfig(finetune=str(run), **QUICK)
    whole, cut = (replace(config, output_dir=str(tmp_path / name)) for name in ("whole", "cut"))
    finetune(whole)

    def fails(*arguments) -> None:
        raise ValueError("--data_path: unreadable")

    monkeypatch.setattr(finetune_module, "evaluate", fails)
    with pytest.raises(ValueError, match="unreadable"):
        finetune(cut)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "cut/checkpoint.pt")["step"] == 4
    finetune(replace(cut, resume="auto"))
    lines = []
    for name in ("whole", "cut"):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines.append([{k: json.loads(line)[k] for k in ("step", "loss", "top1")} for line in text.splitlines()])
    assert lines[0] == lines[1] and len(lines[0]) == 2
    ours, theirs = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert ours["best"] == theirs["best"] and all(
        torch.equal(ours["model"][k], theirs["model"][k]) for k in ours["model"]
    )


@pytest.mark.parametrize("origin", ["finetune", "like"])
def test_a_finished_run_stays_as_it_is_unless_more_is_asked_for(run: Path, tmp_path: Path, origin: str) -> None:
    """Not even its evaluation is run again; one by other flags is, and leaves what the folder says of the training."""
    tuned = tmp_path / "tuned"
    config = FinetuneConfig(**{origin: str(run)}, output_dir=str(tuned), **QUICK)
    path = finetune(config)

    def contents() -> dict[str, tuple[int, bytes]]:
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tuned.iterdir()}

    before = contents()
    assert finetune(replace(config, resume="auto")) == path and contents() == before

    assert finetune(replace(config, resume="auto", report=True)) == path
    result, was = json.loads(path.read_text()), json.loads(before[path.name][1])
    assert "confusion" in result and "confusion" not in was and result["top1"] == was["top1"]
    for name in ("config.yaml", "environment.json"):
        assert contents()[name] == before[name]
    path.unlink()
    assert json.loads(finetune(replace(config, resume="auto")).read_text())["top1"] == was["top1"]


def test_gradients_are_guarded_and_logged_and_waiting_for_data_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What pretraining has: the norm of the gradient, hints about slow data, and no silent --world_size."""
    real = step_module.accumulate_gradients

    def broken(run, *arguments):
        loss = real(run, *arguments)
        if run.step == 5:
            run.model.cls_token.grad.fill_(float("inf"))
        return loss

    config = FinetuneConfig(finetune=str(run), output_dir=str(tmp_path / "tuned"), **QUICK)
    monkeypatch.setattr(step_module, "accumulate_gradients", broken)
    with pytest.raises(FloatingPointError, match="gradient's norm inf at step 5"):
        finetune(config)
    state = checkpoint.load(tmp_path / "tuned/checkpoint.pt")
    assert state["step"] == 4 and all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert json.loads((tmp_path / "tuned/metrics.jsonl").read_text().splitlines()[0])["grad_norm"] > 0
    monkeypatch.setattr(step_module, "accumulate_gradients", real)
    monkeypatch.setattr("mae_et.engine.logger.MAX_DATA_WAIT", -1.0)
    finetune(replace(config, overwrite=True))
    assert "waited for data" in (shown := capsys.readouterr().out) and "--replay" not in shown
    with pytest.raises(ValueError, match="--world_size 2: start with torchrun --nproc_per_node=2"):
        finetune(replace(config, world_size=2))


def test_what_begins_with_a_fine_tuned_model_leaves_that_ones_result(run: Path, tmp_path: Path) -> None:
    first = finetune(FinetuneConfig(finetune=str(run), output_dir=str(tmp_path / "first"), **QUICK))
    own = (tmp_path / "first/eval-finetune.json").read_bytes()
    assert first == run / "eval-finetune.json" and first.read_bytes() == own
    config = FinetuneConfig(finetune=str(tmp_path / "first"), output_dir=str(tmp_path / "second"), **QUICK)
    assert finetune(config) == tmp_path / "second/eval-finetune.json"
    assert (tmp_path / "first/eval-finetune.json").read_bytes() == own


@pytest.mark.parametrize("average", [False, True])
def test_the_cost_counts_every_evaluation(run: Path, average: bool) -> None:
    """As its seconds do; with averaged weights each one classifies the images twice."""
    config = FinetuneConfig(finetune=str(run), model_ema=average, **QUICK | {"epochs": 3})
    result = json.loads(finetune(config).read_text())
    images = 3 * 12 * (1 + average)
    evaluations = images * load_encoder(config).flops_per_image
    assert result["cost"]["flops"] == pytest.approx(result["training"]["flops"] + evaluations, rel=1e-12)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_model_that_began_with_a_classifier_says_what_it_classifies_itself(run: Path, tmp_path: Path, pooled) -> None:
    finetune(FinetuneConfig(finetune=str(run), output_dir=str(tmp_path / "a"), cls_token=pooled, **QUICK))
    began = FinetuneConfig(finetune=str(tmp_path / "a"), output_dir=str(tmp_path / "b"), cls_token=not pooled, **QUICK)
    finetune(began)
    found = checkpoint.read_pretrained(tmp_path / "b")
    assert found.record.pooled is pooled
    assert ("fc_norm.weight" in found.head) is pooled


def test_a_save_when_stopped_keeps_the_one_before(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a second save of the same step takes the first one's place."""
    signal_in_step(6, monkeypatch)
    with pytest.raises(SystemExit, match="143"):
        finetune(FinetuneConfig(finetune=str(run), output_dir=str(tmp_path / "cut"), **QUICK))
    newest, older = (tmp_path / "cut" / name for name in ("checkpoint.pt", "checkpoint.prev1.pt"))
    assert checkpoint.load(newest)["step"] in (6, 7)  # it looks for signals while the device works
    assert checkpoint.load(older)["step"] == 4


def test_resuming_takes_the_range_of_values_from_the_checkpoint(run: Path, pictures: Path, tmp_path: Path) -> None:
    """And older checkpoints, which leave out a default or keep the name of the dropped decoder, go on."""
    config = FinetuneConfig(model="vit_tiny_patch16", input_size=16, data_path=str(pictures), **QUICK)
    config = replace(config, output_dir=str(tmp_path / "old"))
    finetune(config)
    path = tmp_path / "old/checkpoint.pt"
    state = checkpoint.load(path)
    del state["shape"]["mlp_ratio"]
    state["shape"]["decoder"] = "cross"
    checkpoint.save(state | {"value_range": [0, 200]}, path)
    rt = Runtime(torch.device("cpu"), "fp32")
    resumed = FinetuneRun.create(config, rt, load_encoder(config), open_source(str(pictures), "train"))
    resumed.restore(path)
    assert resumed.encoder.record.value_range == resumed.held_out.value_range == [0, 200]


def test_from_scratch_does_not_go_on_as_fine_tuned(run: Path, tmp_path: Path) -> None:
    finetune(FinetuneConfig(like=str(run), output_dir=str(tmp_path / "tuned"), **QUICK))
    with pytest.raises(ValueError, match=r"like was .*, is $"):
        finetune(FinetuneConfig(finetune=str(run), output_dir=str(tmp_path / "tuned"), resume="auto", **QUICK))


def test_weights_from_scratch_are_a_function_of_the_seed(pictures: Path) -> None:
    """They once were others each time."""
    config = FinetuneConfig(model="vit_tiny_patch16", input_size=16, depth=1, data_path=str(pictures), seed=3)
    first, same, other = (load_encoder(each).state for each in (config, config, replace(config, seed=4)))
    for key, tensor in first.items():
        assert torch.equal(tensor, same[key]), key
    weight = "encoder.patch_embed.proj.weight"
    assert not torch.equal(first[weight], other[weight])


def test_another_architecture_is_named_by_the_flags_that_ask_for_it(run: Path) -> None:
    with pytest.raises(ValueError, match=r"^--depth 5 \(depth 5\) is another architecture than .* \(depth 3\)$"):
        load_encoder(FinetuneConfig(finetune=str(run), depth=5))


def test_what_is_like_a_run_sees_images_as_it_did(run: Path, pictures: Path) -> None:
    """A run of ours that knows no range of values did without; only for others is one measured."""
    for flag in ("finetune", "like"):
        assert load_encoder(FinetuneConfig(**{flag: str(run)})).ours
    assert not load_encoder(FinetuneConfig(model="vit_tiny_patch16", data_path=str(pictures))).ours


def test_overwrite_replaces_nothing_before_all_flags_are_known_to_do(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FinetuneConfig(finetune=str(run), output_dir="tuned", **QUICK)
    monkeypatch.chdir(tmp_path)
    finetune(config)
    (tmp_path / "tuned/eval-knn.json").write_text("{}")
    with pytest.raises((ValueError, AssertionError)):
        finetune(replace(config, overwrite=True, aa="bogus"))
    assert (tmp_path / "tuned/checkpoint.pt").exists()
    finetune(replace(config, overwrite=True))
    assert not (tmp_path / "tuned/eval-knn.json").exists()  # of the run that is no more


def test_what_eval_is_told_is_held_against_the_model(run: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(finetune=str(run), eval=True, resume="auto")
    with pytest.raises(ValueError, match=r"--resume auto: .*run/finetune holds no checkpoint"):
        finetune(config)
    finetune(FinetuneConfig(finetune=str(run), **QUICK))
    assert json.loads(finetune(config).read_text())["num_classes"] == 3
    with pytest.raises(ValueError, match="tells 3 classes apart, --nb_classes says 7"):
        finetune(replace(config, nb_classes=7))


def test_a_classifier_whose_outputs_are_not_finite_has_no_accuracy(run: Path, tmp_path: Path) -> None:
    finetune(FinetuneConfig(finetune=str(run), output_dir=str(tmp_path / "tuned"), **QUICK))
    state = checkpoint.load(path := tmp_path / "tuned/checkpoint.pt")
    state["head"]["head.weight"][0] = 3e38
    checkpoint.save(state, path)
    with pytest.raises(FloatingPointError, match=r"tuned gives \d+ of 12 images scores that are not finite"):
        finetune(FinetuneConfig(finetune=str(path.parent), eval=True, device="cpu", precision="fp32"))
    assert not (tmp_path / "tuned/eval-finetuned.json").exists()
    state["head"]["head.weight"][0] = float("nan")
    checkpoint.save(state, path)
    for flags in ({"eval": True}, {"output_dir": str(tmp_path / "again")}):
        with pytest.raises(ValueError, match=r"checkpoint\.pt: head\.weight holds numbers that are not finite"):
            finetune(FinetuneConfig(finetune=str(path.parent), **flags))


def test_more_neighbours_than_pictures_that_can_be_read_are_refused(run: Path, pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    for path in sorted(data.glob("train/*/*.png"))[:6]:
        path.write_bytes(b"")
    config = FinetuneConfig(finetune=str(run), data_path=str(data), knn=True, k=20, damaged_limit=0.5)
    with pytest.raises(ValueError, match="--k 20 neighbours, but 18 training images can be read"):
        probe(config)
    assert probe(replace(config, k=3))["knn"]["train_images"] == 18


def test_the_limit_of_damaged_pictures_holds_over_all_ranks(run: Path, pictures: Path, tmp_path: Path) -> None:
    data = spoiled(pictures, tmp_path / "data", 8)
    on_ranks(2, tmp_path / "log", _refuses_damage, run, data)


def _refuses_damage(run: Path, data: Path) -> None:
    config = FinetuneConfig(finetune=str(run), data_path=str(data), knn=True, k=3, damaged_limit=0.6)
    with pytest.raises(ValueError, match=r"8 of 12 images are damaged, more than --damaged_limit 0\.6"):
        probe(config)


def test_weights_of_another_run_are_not_gone_on_with(run: Path, tmp_path: Path, capsys) -> None:
    """A run folder that was replaced, or trained on, has other weights than those that fine-tuning there began with."""
    config = FinetuneConfig(finetune=str(run), resume="auto", **QUICK)
    finetune(config)
    before = (run / "eval-finetune.json").read_bytes()
    finetune(config)  # of the same weights
    state = checkpoint.load(run / "checkpoint.pt")
    state["model"]["encoder.norm.bias"] += 1e-3
    checkpoint.save(state, run / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"--resume auto: .* began with other weights than those of .*--overwrite"):
        finetune(config)
    assert (run / "eval-finetune.json").read_bytes() == before
    finetune(replace(config, resume=str(run / "finetune/checkpoint.pt")))
    assert "began with other weights" in " ".join(capsys.readouterr().out.split())


def test_small_grids_of_own_positions_are_numbered_from_zero_in_evaluation_too(run: Path) -> None:
    encoder = load_encoder(FinetuneConfig(finetune=str(run), input_size=8))
    for own in (False, True):
        model = MaskedAutoencoder(**encoder.shape.to_dict(decoder=False) | {"own_positions": own}).eval()
        state = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("encoder.")}
        judged = build_classifier(replace(encoder, shape=model.shape, state=state), 0, pooled=False).eval()
        images = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(judged.forward_features(images), model.encode(images), rtol=1e-4, atol=1e-5)


def test_fine_tuning_is_not_put_beside_results_of_other_weights(run: Path, tmp_path: Path) -> None:
    """A probe of the encoder as it was before training makes a folder of its own, which a baseline may go on in."""
    like = FinetuneConfig(like=str(run), output_dir=str(tmp_path / "floor"), **QUICK)
    probe(replace(like, knn=True, k=3))
    other = replace(like, like="", finetune=str(run))
    for config in (other, replace(other, resume="auto")):
        with pytest.raises(ValueError, match="floor is the run of other weights; choose another folder for these"):
            finetune(config)
    finetune(other := replace(other, output_dir=""))
    with pytest.raises(ValueError, match="finetune is the run of other weights"):
        probe(replace(other, knn=True, k=3, output_dir=str(run / "finetune")))
    finetune(like)
    assert {path.name for path in (tmp_path / "floor").glob("eval-*")} == {"eval-knn.json", "eval-finetune.json"}


def test_a_fine_tuning_that_died_before_its_first_checkpoint_begins_anew(run: Path) -> None:
    config = FinetuneConfig(finetune=str(run), **QUICK, resume="auto")
    finetune(config)
    for path in (run / "finetune").glob("*.pt"):
        path.unlink()
    assert finetune(config).exists() and (run / "finetune/checkpoint.pt").exists()


def test_only_a_runs_own_weights_are_of_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export in its folder may be of an earlier run, and a copy of others."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(run / "checkpoint.pt", run / "copy.pt")
    checkpoint.write_export(checkpoint.read_pretrained(run), SHAPE, "facebook", run / "facebook.pth")
    for name in ("copy.pt", "facebook.pth"):
        assert run_folder.run_of(run / name) is None
    for name in ("", "checkpoint.pt", "checkpoint.prev2.pt", "best.pt", "encoder.safetensors"):
        (run / name).touch()
        assert run_folder.run_of(run / name) == run


def test_an_evaluation_alone_ends_with_a_signal_as_any_program(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, before = sys.modules["mae_et.evaluate.finetune"], signal.getsignal(signal.SIGTERM)
    seen = []
    monkeypatch.setattr(module, "evaluate_only", lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    finetune(FinetuneConfig(finetune=str(run), eval=True))
    assert seen == [before]


def test_a_run_that_trains_nothing_is_said_or_refused(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = FinetuneConfig(finetune=str(run), **QUICK | {"epochs": 1, "total_batch_size": 24, "warmup_epochs": 0.1})
    finetune(config)
    assert "--epochs 1 is one step, whose learning rate is 0: it never trains anything" in caplog.messages
    with pytest.raises(ValueError, match=r"--start_epoch 1\.99: none of 2 steps would be left"):
        finetune(replace(config, epochs=2, start_epoch=1.99, overwrite=True))


def test_weights_before_the_end_of_fine_tuning_are_said_to_be_and_have_no_figures_of_the_end(
    run: Path, tmp_path: Path
) -> None:
    finetune(FinetuneConfig(finetune=str(run), **QUICK, keep_checkpoints=9))
    probe(
        FinetuneConfig(
            finetune=str(run / "finetune"), knn=True, k=3, layers=(1,), **QUICK | {"epochs": None, "lr": None}
        )
    )
    last, early = (
        checkpoint.read_pretrained(run / "finetune" / name) for name in ("checkpoint.pt", "checkpoint.prev1.pt")
    )
    assert last.unfinished == "" and re.fullmatch(r"step \d+ of \d+", early.unfinished)
    cards = []
    for weights in (last, early):
        checkpoint.write_export(weights, weights.shape, "timm", tmp_path / "timm", run=run / "finetune")
        cards.append((tmp_path / "timm/README.md").read_text())
    assert "| fine-tuning" in cards[0] and "| kNN of block 1" in cards[0]
    assert "before the end of that run" in cards[1] and "None is recorded" in cards[1]


def test_what_goes_on_in_another_folder_takes_its_metrics_and_best_weights_along(run: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(finetune=str(run), **QUICK, keep_checkpoints=9)
    finetune(config)
    best = checkpoint.load(run / "finetune/best.pt")["step"]
    for number in (1, 2, 3):
        path = run / f"finetune/checkpoint.prev{number}.pt"
        if not path.exists():
            break
        step, folder = checkpoint.load(path)["step"], tmp_path / str(number)
        finetune(replace(config, resume=str(path), output_dir=str(folder)))
        kept, whole = ((at / "metrics.jsonl").read_text().splitlines() for at in (folder, run / "finetune"))
        assert [json.loads(line)["step"] for line in kept] == [json.loads(line)["step"] for line in whole]
        assert (folder / "best.pt").exists() or best > step
    assert number > 1


def test_classes_of_one_name_are_told_apart_or_refused(pictures: Path) -> None:
    """ImageNet has two cranes and two maillots."""
    holder = types.SimpleNamespace(classes=[("crane", "bird"), ("tench",), ("crane", "machine")])
    assert _class_names(holder, None) == ["crane (0)", "tench", "crane (2)"]
    source = open_source(str(pictures))
    assert with_classes(source, source.classes, "D", "it") is source
    with pytest.raises(ValueError, match=r"class\(es\) red are there twice in the model: which is meant can't be told"):
        with_classes(source, [*source.classes, "red"], "D", "the model")


def test_a_leak_is_said_however_the_path_is_spelled(
    run: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_encoder(FinetuneConfig(finetune=str(run), data_path=f"{pictures}/", holdout=9))
    assert "was pretrained with --holdout 0, on some of these" in caplog.text

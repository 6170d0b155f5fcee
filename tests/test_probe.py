"""Probes: both agree with scikit-learn on the same features, and the backbone stays as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny import QUICK, SHAPE, tiny
from torch import nn

from mae_et import checkpoint
from mae_et.compare.runs import read_run
from mae_et.data.stream import derive_seed
from mae_et.engine import storage
from mae_et.engine.features import knn_scores
from mae_et.engine.pretrain import pretrain
from mae_et.engine.runtime import Runtime
from mae_et.evaluate import probe as probe_module
from mae_et.evaluate.accuracy import Accuracy
from mae_et.evaluate.config import FinetuneConfig
from mae_et.evaluate.encoder import build_classifier, load_encoder
from mae_et.evaluate.finetune import finetune
from mae_et.evaluate.probe import features_of, lars, probe, probe_heads, solve_linear, standardize
from mae_et.files import CheckpointError
from mae_et.model import MaskedAutoencoder

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = Runtime(torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


@pytest.mark.parametrize("temperature", [0.07, 0.005])
def test_knn_agrees_with_a_loop_over_the_neighbours_of_scikit_learn(digits, temperature: float) -> None:
    """In shares of the votes. In float32, exp(1 / 0.005) would be infinite."""
    features, labels = digits
    train, queries, k = features[:900], features[900:1100], 20
    scores = knn_scores(train, labels[:900], queries, 10, k, temperature)
    finder = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(train.double().numpy())
    for row, (distances, indices) in enumerate(zip(*finder.kneighbors(queries.double().numpy()), strict=True)):
        votes = np.zeros(10)
        for distance, index in zip(distances, indices, strict=True):
            votes[labels[index]] += np.exp((1 - distance) / temperature)
        np.testing.assert_allclose(scores[row] / scores[row].sum(), votes / votes.sum(), rtol=2e-3, atol=1e-7)
        assert scores[row].argmax() == votes.argmax()


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_the_cached_linear_probe_is_the_converged_logistic_regression(digits, l2: float) -> None:
    features, labels = digits
    statistics = torch.var_mean(features[:1200], dim=0, correction=0)
    train, held_out = (standardize(part, *statistics) for part in (features[:1200], features[1200:]))
    head = solve_linear(train, labels[:1200], 10, l2)
    reference = LogisticRegression(C=1 / (l2 * 1200), max_iter=5000, tol=1e-8)
    reference.fit(train.double().numpy(), labels[:1200].numpy())

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> float:
        entropy = nn.functional.cross_entropy(train.double() @ weight.T + bias, labels[:1200])
        return entropy.item() + l2 / 2 * weight.square().sum().item()

    theirs = loss(torch.tensor(reference.coef_), torch.tensor(reference.intercept_))
    assert loss(head.weight, head.bias) == pytest.approx(theirs, abs=1e-6)
    accuracy = (head(held_out.double()).argmax(1) == labels[1200:]).double().mean().item()
    assert accuracy == pytest.approx(reference.score(held_out.double().numpy(), labels[1200:].numpy()), abs=0.004)
    assert accuracy > 0.85


def test_the_linear_probe_judges_other_images_by_the_statistics_of_the_training_images(digits) -> None:
    features, labels = digits
    config, layer = FinetuneConfig(finetune="x", linear_probe=True, l2=1e-2), (1, "cls")
    classify = probe_module._fit(config, CPU, ({layer: features[:1200]}, labels[:1200]), 10)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (1e-2 * 1200), max_iter=5000, tol=1e-8))
    reference.fit(features[:1200].double().numpy(), labels[:1200].numpy())
    found = classify({layer: features[1200:]})[layer].softmax(1).numpy()
    np.testing.assert_allclose(found, reference.predict_proba(features[1200:].double().numpy()), atol=2e-3)


def test_standardizing_is_batchnorm_without_affine(digits) -> None:
    features = digits[0][:100]
    norm = nn.BatchNorm1d(64, affine=False, eps=1e-6)
    statistics = torch.var_mean(features, dim=0, correction=0)
    torch.testing.assert_close(standardize(features, *statistics), norm(features))


def test_features_are_those_of_the_unmasked_encoder(run: Path) -> None:
    start = load_encoder(FinetuneConfig(finetune=str(run), knn=True))
    model = build_classifier(start, 0, pooled=False).eval()
    images = torch.randn(2, 3, 16, 16)
    autoencoder = MaskedAutoencoder(**SHAPE | {"target_dim": 192})
    autoencoder.load_state_dict(checkpoint.load(run / "checkpoint.pt")["model"])
    tokens = autoencoder.encode(images)
    found = features_of(model, images, [(1, "cls"), (3, "cls"), (3, "mean")], CPU)
    torch.testing.assert_close(found[3, "cls"], tokens[:, 0])
    torch.testing.assert_close(found[3, "mean"], tokens[:, 1:].mean(1))
    assert not torch.allclose(found[1, "cls"], found[3, "cls"])


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_the_backbone_is_in_evaluation_mode_and_its_bytes_stay(run: Path, monkeypatch, features: str) -> None:
    backbones = []

    def build(*arguments, **keywords):
        model = build_classifier(*arguments, **keywords)
        backbones.append((model, {key: t.clone() for key, t in model.state_dict().items()}))
        model.register_forward_pre_hook(lambda module, _: pytest.fail("in training mode") if module.training else None)
        model.blocks[0].register_forward_pre_hook(lambda m, _: pytest.fail("in training mode") if m.training else None)
        return model

    monkeypatch.setattr(probe_module, "build_classifier", build)
    config = FinetuneConfig(finetune=str(run), linear_probe=True, features=features, **QUICK)
    [result] = probe(config).values()
    assert result["num_images"] == 12
    [(model, before)] = backbones
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for key, tensor in model.state_dict().items():
        assert tensor.numpy().tobytes() == before[key].numpy().tobytes(), key


def test_the_probe_on_augmented_images_draws_crops_of_the_area_that_is_asked_for(run: Path, monkeypatch) -> None:
    areas, real = [], probe_module.TrainCrops

    def crops(*arguments, **keywords):
        made = real(*arguments, **keywords)
        areas.append(made.crop_scale)
        return made

    monkeypatch.setattr(probe_module, "TrainCrops", crops)
    probe(FinetuneConfig(finetune=str(run), linear_probe=True, features="augmented", crop_scale=(0.5, 0.9), **QUICK))
    assert areas == [(0.5, 0.9)]


def test_lars_adapts_matrices_and_leaves_biases_alone() -> None:
    torch.manual_seed(0)
    heads = probe_heads([(1, "cls")], 8, 4)
    linear = heads[1, "cls"][1]
    assert not list(heads[1, "cls"][0].parameters())
    assert 0.005 < linear.weight.std() < 0.015
    optimizer = lars(heads, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 2.0
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    nn.functional.cross_entropy(heads[1, "cls"](torch.randn(16, 8)), torch.arange(16) % 4).backward()
    optimizer.step()
    step = (linear.weight - before["weight"]).norm()
    torch.testing.assert_close(step, 2.0 * 0.001 * before["weight"].norm(), rtol=1e-4, atol=0)  # the trust coefficient
    torch.testing.assert_close(linear.bias, before["bias"] - 2.0 * linear.bias.grad)


@pytest.mark.parametrize(
    "protocol",
    [
        {"knn": True, "k": 3},
        {"linear_probe": True},
        {"linear_probe": True, "features": "augmented", "epochs": 25, "lr": 5.0, "batch_size": 24},
    ],
)
def test_a_probe_finds_the_colours_at_several_layers_in_one_pass(run: Path, protocol: dict) -> None:
    config = FinetuneConfig(**QUICK | {"finetune": str(run), "layers": (1, 3), "report": True} | protocol)
    probe(config)
    result = json.loads((run / f"eval-{config.protocol}.json").read_text())
    places = [(row["layer"], row["pooling"]) for row in result["places"]]
    assert places == [(1, "cls"), (1, "mean"), (3, "cls"), (3, "mean")]
    assert result["places"][1]["top1"] > 80  # chance is 33
    assert result["top1"] == result["places"][2]["top1"]  # the last block's class token, not the best
    assert sum(map(sum, result["confusion"])) == result["num_images"] == 12
    assert result["cost"]["flops"] > 0


def test_accuracy_counts_every_image_once() -> None:
    tally, scores = Accuracy(6, torch.device("cpu")), torch.eye(6)
    scores[5] = torch.tensor([6.0, 5, 4, 3, 2, 1])  # sixth guess
    tally.add(scores[:4], torch.arange(4))
    tally.add(scores[4:], torch.arange(4, 6))
    result = tally.result()
    assert result["num_images"] == 6
    assert result["top1"] == pytest.approx(500 / 6)
    assert result["top5"] == pytest.approx(500 / 6)
    assert tally.details(list("abcdef"))["per_class_accuracy"]["f"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 99}, "--k 99 neighbours, but there are 24 training images"),
        (
            {"knn": False, "linear_probe": True, "features": "augmented", "batch_size": 1},
            "a batch of 1: --features augmented .* give a --total_batch_size of 2 or more",
        ),
        ({"layers": (4,)}, "--layers 4: this encoder has blocks 1 to 3"),
        ({"finetune": ""}, "--knn needs --finetune"),
        (
            {"like": "RUN", "finetune": "", "output_dir": "RUN"},
            "is the run of other weights; choose another",
        ),
        ({"resume": "auto"}, "--knn takes minutes and can't --resume"),
        ({"knn": False, "corruptions": True}, "--corruptions is for --linear_probe, --knn and --eval; fine-tune first"),
    ],
)
def test_mistakes_are_explained_in_one_line(run: Path, changes: dict, message: str) -> None:
    changes = {name: str(run) if value == "RUN" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        probe(FinetuneConfig(**QUICK | {"finetune": str(run), "knn": True} | changes))


@pytest.mark.parametrize("judge", [{"knn": True}, {"eval": True}])
def test_nothing_is_left_of_an_evaluation_that_is_refused(run: Path, tmp_path: Path, judge: dict) -> None:
    flags = {"finetune": str(run), "output_dir": str(tmp_path / "out"), "data_path": str(tmp_path / "none")} | judge
    with pytest.raises((FileNotFoundError, ValueError), match=r"--data_path|no classifier"):
        (probe if "knn" in judge else finetune)(FinetuneConfig(**QUICK | flags))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named_before_the_work(run: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(probe_module, "extract", lambda *arguments: pytest.fail("it has begun"))
    with pytest.raises(CheckpointError, match=r"^--output_dir .*file/x: can't be created: Not a directory$"):
        probe(FinetuneConfig(**QUICK, knn=True, finetune=str(run), output_dir=str(tmp_path / "file/x")))


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (float("nan"), r"checkpoint.pt: encoder\.blocks\.1\.mlp\.fc1\.weight holds numbers that are not finite"),
        (1e38, "checkpoint.pt gives features that are not finite"),
    ],
    ids=["weights", "features"],
)
@pytest.mark.parametrize("protocol", ["knn", "linear_probe", "augmented"])
def test_weights_or_features_that_are_not_finite_have_no_result(
    run: Path, factor: float, message: str, protocol: str
) -> None:
    """They once had one, that of whichever class is first."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["model"]["encoder.blocks.1.mlp.fc1.weight"][0] *= factor
    state["model"]["encoder.blocks.1.mlp.fc2.weight"][:, 0] *= 1e6
    storage.save(state, run / "checkpoint.pt")
    flags = {"linear_probe": True, "features": "augmented"} if protocol == "augmented" else {protocol: True}
    with pytest.raises((ValueError, FloatingPointError), match=message):
        probe(FinetuneConfig(**QUICK, **flags, finetune=str(run)))
    assert not list(run.glob("eval-*"))


def test_a_classifier_that_diverges_has_no_result(run: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"--lr, --blr .* gives 12 of 12 images scores that are not finite"):
        probe(FinetuneConfig(**QUICK | {"lr": 1e38}, finetune=str(run), linear_probe=True, features="augmented"))
    assert not list(run.glob("eval-*"))


def test_results_never_lie_in_the_run_of_other_weights(run: Path, tmp_path: Path, monkeypatch) -> None:
    """`compare` would take them for that run's: foreign weights, another run, another seed of an untrained encoder."""
    (tmp_path / "plain").mkdir()
    shutil.copy(run / "checkpoint.pt", tmp_path / "plain")
    shutil.copytree(run, tmp_path / "output_dir")
    monkeypatch.chdir(tmp_path)  # ./output_dir is the default of pretraining too
    plain = {"finetune": "plain/checkpoint.pt"}
    untrained = {"like": str(run), "output_dir": str(tmp_path / "floor")}
    for changes in (
        plain,
        plain | {"output_dir": str(run)},
        {"finetune": str(run), "output_dir": "output_dir"},
        untrained | {"seed": 1},
        untrained | {"like": "output_dir"},
    ):
        probe(FinetuneConfig(**QUICK, knn=True, **untrained))
        with pytest.raises(ValueError, match=r"--output_dir .* is the run of other weights; choose another folder"):
            probe(FinetuneConfig(**QUICK | {"knn": True} | changes))
    assert not [*run.glob("eval-*"), *(tmp_path / "output_dir").glob("eval-*")]
    probe(FinetuneConfig(**QUICK | plain, knn=True, output_dir="elsewhere"))
    probe(FinetuneConfig(**QUICK, knn=True, finetune=str(run), output_dir=str(run)))


def test_a_result_says_its_step_and_what_it_replaces(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k in (3, 3, 5):
        assert not caplog.messages or "is replaced" not in caplog.text
        probe(FinetuneConfig(**QUICK, knn=True, finetune=str(run), k=k))
    assert f"{run / 'eval-knn.json'} is replaced; it was of --k 3" in caplog.messages
    assert json.loads((run / "eval-knn.json").read_text())["step"] is None
    for step in (7, 8):
        storage.save(torch.load(run / "checkpoint.pt", weights_only=True) | {"step": step}, run / "checkpoint.pt")
        probe(FinetuneConfig(**QUICK, knn=True, finetune=str(run), k=5))
        assert json.loads((run / "eval-knn.json").read_text())["step"] == step
    assert [line[-6:] for line in caplog.messages if "is replaced" in line] == [" --k 3", "step 7"]


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "7", '{"flags": [], "checkpoint": "x"}', '{"flags": {}, "checkpoint": null}', "{", '{"flags'],
)
def test_a_result_of_another_program_is_replaced(run: Path, text: str) -> None:
    (run / "eval-knn.json").write_text(text)
    probe(FinetuneConfig(**QUICK, knn=True, finetune=str(run)))
    assert json.loads((run / "eval-knn.json").read_text())["protocol"] == "knn"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "holds a config.yaml that can't be read; choose another"),
        ("!!python/object:x.Y {}", "holds a config.yaml that can't be read; choose another"),
        ("", "is the run of other weights"),
        ("- like", "is the run of other weights"),
    ],
)
def test_a_run_folder_of_another_program_takes_no_result(run: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    for origin in ({"finetune": str(run)}, {"like": str(run)}):
        with pytest.raises(ValueError, match=f"^--output_dir {tmp_path} {message}"):
            probe(FinetuneConfig(**QUICK | origin, knn=True, output_dir=str(tmp_path)))


def test_a_result_of_other_weights_or_data_is_not_replaced_silently(
    run: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it was of is named, also where no flag did: the checkpoint in a folder, the data of the pretraining."""
    other = shutil.copytree(pictures, tmp_path / "other")
    config = FinetuneConfig(**QUICK, knn=True, finetune=str(run))
    shutil.copy(run / "checkpoint.pt", run / "best.pt")
    for changes in ({}, {"finetune": f"{run}/"}, {"finetune": str(run / "best.pt")}, {"data_path": str(other)}, {}):
        probe(replace(config, **changes))
    replaced = [line.partition("; it was of ")[2] for line in caplog.messages if "is replaced" in line]
    best, data = f"the weights {run / 'best.pt'}", f"--data_path {pictures}"
    assert replaced == [f"the weights {run}/", f"{data}, {best}", f"--data_path {other}"]


def test_what_is_like_a_run_is_judged_untrained(run: Path, tmp_path: Path, monkeypatch) -> None:
    """As a checkpoint of the weights that a run begins with; its folder is one that `compare` reads."""
    extracted, real = [], probe_module.extract
    monkeypatch.setattr(probe_module, "extract", lambda *given: extracted.append(real(*given)) or extracted[-1])
    (untrained,) = probe(FinetuneConfig(like=str(run), output_dir=str(tmp_path / "0"), knn=True, **QUICK)).values()
    state = torch.load(run / "checkpoint.pt", weights_only=True)  # now as before the run's first step
    torch.manual_seed(derive_seed(0, "weights"))
    storage.save(state | {"model": MaskedAutoencoder(**state["shape"]).state_dict()}, run / "checkpoint.pt")
    (begun,) = probe(FinetuneConfig(finetune=str(run), knn=True, **QUICK)).values()
    assert untrained == begun
    features = [next(iter(features.values())) for features, _ in extracted]  # held out, training; the same again
    assert len(features) == 4 and features[0].equal(features[2]) and features[1].equal(features[3])
    record = read_run(tmp_path / "0")
    assert record.ledger is None and record.evaluations["knn"]["top1"] == untrained["top1"]
    assert record.evaluations["knn"]["origin"] == "scratch"


def test_a_probe_needs_held_out_images(run: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(pictures / "train")
    with pytest.raises(FileNotFoundError, match="has no held-out images"):
        probe(FinetuneConfig(finetune=str(run), knn=True, data_path=str(tmp_path / "data"), **QUICK))


def test_knn_and_a_linear_probe_of_one_call_share_their_features(run: Path, monkeypatch) -> None:
    alone = {}
    for protocol in ("knn", "linear_probe"):
        alone |= probe(FinetuneConfig(finetune=str(run), **QUICK | {protocol: True}))
    before = [json.loads((run / f"eval-{protocol}.json").read_text()) for protocol in alone]
    costs, flags = [file["cost"]["flops"] for file in before], [file["flags"] for file in before]
    extracted, real = [], probe_module.extract
    monkeypatch.setattr(probe_module, "extract", lambda *arguments: extracted.append(1) or real(*arguments))
    both = probe(FinetuneConfig(finetune=str(run), knn=True, linear_probe=True, **QUICK))
    assert both == alone and set(both) == {"knn", "linear_probe"}
    assert len(extracted) == 2  # training and held-out images, once each
    files = {protocol: json.loads((run / f"eval-{protocol}.json").read_text()) for protocol in both}
    assert [file["cost"]["flops"] for file in files.values()] == [costs[0], 0]  # costs add up
    assert [file["flags"] for file in files.values()] == flags  # as if each had been asked for alone
    for protocol, file in files.items():
        assert file["top1"] == both[protocol]["top1"] and file["flags"]["knn"] == (protocol == "knn")


def test_each_probe_has_the_flags_that_it_uses() -> None:
    """`compare` holds them against each other: what one of them doesn't use must not keep its results apart."""
    common = {"finetune": "x", "layers": (1, 3), "holdout": 9}
    training = {"epochs": 10, "batch_size": 32, "lr": 0.2, "crop_scale": (0.5, 1.0)}
    unused = {"mixup": 0.1, "clip_grad": 1.0, "start_epoch": 2}
    both = {"knn": True, "linear_probe": True, "k": 5, "temperature": 0.1, "l2": 0.1}
    knn, augmented = FinetuneConfig(**common, **both, **training, **unused, features="augmented").probes
    cached = FinetuneConfig(**common, **both, **training, **unused).probes[1]
    assert knn == FinetuneConfig(**common, knn=True, k=5, temperature=0.1)
    assert augmented == FinetuneConfig(**common, **training, linear_probe=True, features="augmented")
    assert cached == FinetuneConfig(**common, linear_probe=True, l2=0.1)
    assert FinetuneConfig(**common, **training, knn=True).probes == FinetuneConfig(**common, knn=True).probes


def test_results_on_other_images_leave_the_runs_own_alone(run: Path, pictures: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(**QUICK, knn=True, finetune=str(run), k=3)
    probe(config)
    own = (run / "eval-knn.json").read_bytes()
    other = shutil.copytree(pictures, tmp_path / "other")
    probe(replace(config, data_path=str(other), output_dir=str(tmp_path / "apart")))
    assert (run / "eval-knn.json").read_bytes() == own and (tmp_path / "apart/eval-knn.json").is_file()
    probe(replace(config, data_path=str(pictures), output_dir=str(tmp_path / "both")))
    assert (run / "eval-knn.json").read_bytes() != own and (tmp_path / "both/eval-knn.json").is_file()
    for flags in ({}, {"output_dir": str(tmp_path / "both"), "cls_token": True}):  # as of a run without labels
        (run / "eval-knn.json").unlink()
        probe(replace(config, data_path=str(other), **flags))
        assert json.loads((run / "eval-knn.json").read_text())["flags"]["data_path"] == str(other)


def test_images_that_only_the_checkpoint_names_are_said_to_be_its(run: Path, tmp_path: Path) -> None:
    state = checkpoint.load(run / "checkpoint.pt")
    state["config"]["data_path"] = "images"
    checkpoint.save(state, run / "checkpoint.pt")
    for evaluate, flags in ((probe, {"knn": True}), (finetune, {})):
        with pytest.raises(FileNotFoundError, match=r"images does not exist.*; that is what .* was trained on"):
            evaluate(FinetuneConfig(**QUICK | flags, finetune=str(run)))
        with pytest.raises(FileNotFoundError, match=r"^--data_path nowhere does not exist(?!.*was trained on)"):
            evaluate(FinetuneConfig(**QUICK | flags, finetune=str(run), data_path="nowhere"))


def test_an_unfinished_run_is_named_by_whoever_reads_it(photos: Path, tmp_path: Path, capsys, caplog) -> None:
    run = pretrain(tiny(photos, tmp_path / "run", epochs=1))
    steps = checkpoint.load(run / "checkpoint.pt")["step"]
    for step, words in ((steps, ""), (3, f"step 3 of {steps}")):
        checkpoint.save(checkpoint.load(run / "checkpoint.pt") | {"step": step}, run / "checkpoint.pt")
        pretrained = checkpoint.read_pretrained(run)
        assert pretrained.unfinished == words
        caplog.clear()
        load_encoder(FinetuneConfig(finetune=str(run)))
        assert ("before the end of that run" in caplog.text) == bool(words)
        checkpoint.write_export(pretrained, pretrained.shape, "timm", tmp_path / "timm", run=run)
        card = (tmp_path / "timm/README.md").read_text()
        assert (f"These are weights of {words}, before the end of that run." in card) == bool(words)
        assert ("| total | " in card) != bool(words), "costs of the whole run are not theirs"

"""Muon: what it does to matrices and to all else, when it must do nothing, and that it costs what the plan says."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from tiny import assert_close, assert_same, tiny, weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mae_et import checkpoint
from mae_et.engine import pretrain as pretraining
from mae_et.engine.optim import BETAS, MOMENTUM, Muon, adamw, allocate, guarded_step, muon, set_learning_rate
from mae_et.model import MaskedAutoencoder, create_mae
from mae_et.plan.build import as_vanilla, build_curriculum, shape_of
from mae_et.plan.cost import flops_per_image, input_flops_per_image, muon_flops
from mae_et.plan.flags import from_recipe
from mae_et.plan.report import PlanConfig, plan_report, plan_summary

LR, WEIGHT_DECAY = 0.01, 0.3


def model_and_gradients(
    steps: int = 3, decoder: str = "self"
) -> tuple[MaskedAutoencoder, list[dict[str, torch.Tensor]]]:
    """A small model, and gradients that have nothing in common, for each step."""
    torch.manual_seed(0)
    model = create_mae(
        **{"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "target_dim": 48},
        **{"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2, "decoder": decoder},
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return model, [{name: torch.randn_like(p) for name, p in trained.items()} for _ in range(steps)]


def take(optimizer: torch.optim.Optimizer, model: nn.Module, gradients: dict, loss: float = 0.0) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    set_learning_rate(optimizer, LR)
    guarded_step(optimizer, torch.tensor(loss))


def matrices(model: MaskedAutoencoder) -> dict[str, int]:
    """Names of what Muon is for, written out, and how many matrices each holds."""
    names = [f"encoder.blocks.{i}" for i in range(model.depth)] + ["decoder_blocks.0"]
    found = {}
    for name in names:
        attention = {"q": 1, "kv": 2} if name.startswith("decoder") and model.decoder == "cross" else {"qkv": 3}
        found |= {f"{name}.attn.{part}.weight": count for part, count in (attention | {"proj": 1}).items()}
        found |= {f"{name}.mlp.fc1.weight": 1, f"{name}.mlp.fc2.weight": 1}
    return found


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_matrices_move_as_torchs_muon_moves_each_of_them(decoder):
    """torch's takes one matrix a parameter, so queries, keys and values are given to it one by one."""
    model, gradients = model_and_gradients(decoder=decoder)
    parts = {
        name: [nn.Parameter(part.clone()) for part in model.get_parameter(name).detach().chunk(count)]
        for name, count in matrices(model).items()
    }
    theirs = torch.optim.Muon(
        [part for each in parts.values() for part in each],
        **{"lr": LR, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"},
    )
    ours = muon(model, WEIGHT_DECAY, "bf16")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for each in gradients:
        take(ours, model, each)
        for name, stacked in parts.items():
            for part, gradient in zip(stacked, each[name].chunk(len(stacked)), strict=True):
                part.grad = gradient.clone()
        theirs.step()
    for name, stacked in parts.items():
        moved, expected = model.get_parameter(name).detach() - before[name], torch.cat(stacked).detach() - before[name]
        assert (moved - expected).norm() < 0.02 * expected.norm(), name  # both round to bf16, in other places


def test_an_update_is_orthogonal_and_as_large_as_adamws():
    model, (gradients,) = model_and_gradients(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take(muon(model, 0.0, "fp32"), model, gradients)
    for name, count in matrices(model).items():
        update = (before[name] - model.get_parameter(name).detach()) / LR
        for part, gradient in zip(update.chunk(count), gradients[name].chunk(count), strict=True):
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            scale = 0.2 * max(part.shape) ** 0.5
            singular = u.mT @ (part / scale) @ vh.mT
            assert (singular - singular.diag().diag()).abs().max() < 1e-4, name  # the gradient's own directions
            assert singular.diag().min() > 0.6 and singular.diag().max() < 1.3, name
            assert part.square().mean().sqrt() == pytest.approx(0.2, rel=0.2), name


def test_everything_else_is_adamws():
    ours, gradients = model_and_gradients()
    theirs, _ = model_and_gradients()
    one, other = muon(ours, WEIGHT_DECAY, "fp32"), adamw(theirs, WEIGHT_DECAY)
    for each in gradients:
        take(one, ours, each)
        take(other, theirs, each)
    for name, parameter in ours.named_parameters():
        same = torch.equal(parameter, theirs.get_parameter(name))
        assert same != (name in matrices(ours)), name
    assert one.defaults["betas"] == BETAS


def test_matrices_decay_and_all_parameters_are_trained_once():
    model, gradients = model_and_gradients(1)
    optimizer = muon(model, WEIGHT_DECAY, "fp32")
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == sum(p.requires_grad for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take(optimizer, model, {name: torch.zeros_like(g) for name, g in gradients[0].items()})
    for name in matrices(model):
        torch.testing.assert_close(model.get_parameter(name).detach(), before[name] * (1 - LR * WEIGHT_DECAY))


@settings(max_examples=12)
@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_a_step_that_is_not_finite_changes_nothing(value, first):
    """Neither weights nor state, also where the gradient itself isn't finite."""
    model, gradients = model_and_gradients(2)
    optimizer = muon(model, WEIGHT_DECAY, "fp32")
    allocate(optimizer) if first else take(optimizer, model, gradients[0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = [{k: v.clone() for k, v in each.items()} for each in optimizer.state.values()]
    take(optimizer, model, {name: g * value for name, g in gradients[1].items()}, loss=value)
    assert_same(dict(model.named_parameters()), before)
    for now, then in zip(optimizer.state.values(), state, strict=True):
        assert_same(now, then)
    take(optimizer, model, gradients[1])
    assert not torch.equal(
        model.get_parameter("encoder.blocks.0.mlp.fc1.weight"), before["encoder.blocks.0.mlp.fc1.weight"]
    )


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_it_costs_what_pytorch_counts(decoder):
    model, (gradients,) = model_and_gradients(1, decoder)
    optimizer = muon(model, WEIGHT_DECAY, "fp32")
    with FlopCounterMode(display=False) as counter:
        take(optimizer, model, gradients)
    assert counter.get_total_flops() == muon_flops(model.shape) > 0


def test_a_plan_counts_the_update_of_every_step_however_many_devices_repeat_it(photos, tmp_path):
    config = tiny(photos, tmp_path / "run", opt="muon")
    shape = shape_of(config)
    for devices in (1, 2):
        plan = build_curriculum(config, 40, devices)
        images = [
            stage.images
            * (flops_per_image(shape, stage) + input_flops_per_image(config.input_size, stage, 3, config.lowfreq))
            for stage in plan.stages
        ]
        assert plan.total_flops == sum(images) + plan.total_steps * muon_flops(shape)
    assert [stage.update_flops for stage in build_curriculum(tiny(photos, tmp_path), 40).stages] == [0, 0]


def test_an_exact_allocation_shares_out_the_updates_too(photos, tmp_path):
    """Of equal compute, the two stages have their shares, and together what vanilla takes."""
    for opt in ("adamw", "muon"):
        config = tiny(photos, tmp_path / "run", opt=opt, allocation="flops", epochs=500)
        plan, vanilla = (build_curriculum(c, 40) for c in (config, as_vanilla(config)))
        assert plan.total_flops == pytest.approx(vanilla.total_flops, rel=1e-3)
        assert [stage.flops / plan.total_flops for stage in plan.stages] == pytest.approx([0.5, 0.5], rel=1e-3)
        updates = plan.total_steps * muon_flops(shape_of(config)) * (opt == "muon")
        assert plan.update_share == pytest.approx(updates / plan.total_flops) and plan.update_share < 0.9


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_a_plan_says_what_share_the_updates_have(opt):
    """At 32 images a step of `small` they are most of the work, and must not look free."""
    config = replace(from_recipe(PlanConfig, "small"), opt=opt)
    report = plan_report(config, lambda _: 1000)
    share = report["totals"]["update_share"]
    assert (share > 0.5) == (opt == "muon")
    said = [line for line in plan_summary(report) if "are updates" in line]
    assert [line.partition(" ")[0] for line in said] == ([f"{share:.1%}"] if opt == "muon" else [])


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon") / "run"
    pretraining.pretrain(tiny(photos, folder, opt="muon"))
    return folder


def test_a_run_books_what_was_planned_and_resumes_bit_for_bit(photos, tmp_path, whole, monkeypatch):
    config = tiny(photos, tmp_path / "run", opt="muon", save_steps=2)
    plan = build_curriculum(config, len(list(photos.iterdir())))
    spent = checkpoint.load(whole / "checkpoint.pt")["ledger"]["total"]
    assert spent["flops"] == pytest.approx(plan.total_flops)

    class Killed(Exception):
        pass

    def until(run, *arguments, take_step=pretraining.take_step):
        if run.step == 5:
            raise Killed
        return take_step(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "take_step", until)
        with pytest.raises(Killed):
            pretraining.pretrain(config)
    pretraining.pretrain(tiny(photos, tmp_path / "run", opt="muon", resume="auto"))
    assert_same(weights(tmp_path / "run"), weights(whole))


def test_another_optimiser_is_another_run(photos, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match="opt was muon, is adamw"):
        pretraining.pretrain(tiny(photos, tmp_path / "run", resume="auto"))


@pytest.mark.parametrize("fsdp", [False, True])
def test_ranks_equal_one_process(photos, tmp_path, whole, fsdp):
    config = tiny(photos, tmp_path / "run", opt="muon", batch_size=3, fsdp=fsdp)
    on_ranks(2, tmp_path / "log", partial(pretraining.pretrain, config))
    assert_close(tmp_path / "run", whole)


def test_a_group_says_how_many_matrices_its_weights_hold():
    model, _ = model_and_gradients(1)
    optimizer = muon(model, WEIGHT_DECAY, "fp32")
    assert isinstance(optimizer, Muon)
    names = {p: name for name, p in model.named_parameters()}
    counts = {names[p]: g["matrices"] for g in optimizer.param_groups for p in g["params"] if g["matrices"]}
    assert counts == matrices(model)

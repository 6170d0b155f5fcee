"""Sharded training: ranks over gloo equal one process, stop, resume on other numbers of ranks, and end as any run does.

Ranks are forked from a server that has imported everything, so a run of them takes seconds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from tiny import TINY, Malicious, assert_close, assert_same, tiny, weights
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mae_et import checkpoint, files
from mae_et.checkpoint import read_pretrained
from mae_et.engine import pretrain as pretraining
from mae_et.engine import run_folder, runtime, sharded, step, storage
from mae_et.engine.pretrain import PretrainRun, check_micro_batches, pretrain
from mae_et.engine.run import fsdp_units
from mae_et.engine.runtime import Runtime
from mae_et.evaluate.config import ReconstructConfig
from mae_et.evaluate.reconstruct import reconstruct
from mae_et.model import create_mae
from mae_et.plan.build import build_curriculum
from mae_et.plan.config import PretrainConfig

#: ViT-H's name and patch, everything else as small as can be; on 2 ranks 3 rows each, in several micro-batches.
HUGE = TINY | {
    "model": "mae_vit_huge_patch14",
    "patch_size": None,
    "input_size": 56,
    "depth": 5,  # two units of encoder blocks
    "stages": [{"size_px": 28, "share": 0.4}, {"size_px": 56, "share": 0.6}],
    "epochs": 1.2,
    "total_batch_size": 6,
    "batch_size": 2,
    "clip_grad": 0.05,
    "norm_pix_loss": True,
    "print_steps": 1,
}
SHARDED = {"fsdp": True, "activation_checkpointing": True}
STOP = 5
"""Step after which runs are stopped; the second stage begins later."""


# ── ranks ──


def is_first() -> bool:
    return os.environ["RANK"] == "0"


def replaced(module, name: str, by: Callable):
    """Context in which by(original) is in the place of a module's function."""
    return mock.patch.object(module, name, by(getattr(module, name)))


def train(config: PretrainConfig, stop: int | None = None) -> None:
    """Run; if `stop`, one rank gets SIGTERM in time for all to stop after so many steps."""

    def stopping(take_step):
        def step(run, *arguments):
            if is_first() and run.step + 2 == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return take_step(run, *arguments)

        return step

    end = pytest.raises(SystemExit, match="143") if stop else contextlib.nullcontext()
    with replaced(pretraining, "take_step", stopping), end:  # on all ranks, also without a signal of their own
        pretrain(config)


# ── runs that the tests share ──


@pytest.fixture(scope="module")
def one_process(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process: neither sharded nor recomputing."""
    folder = tmp_path_factory.mktemp("one") / "run"
    on_ranks(1, folder.parent / "log", train, tiny(photos, folder, **HUGE))
    return folder


@pytest.fixture(scope="module")
def two_ranks(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sharded run."""
    folder = tmp_path_factory.mktemp("two") / "run"
    on_ranks(2, folder.parent / "log", train, tiny(photos, folder, **HUGE, **SHARDED))
    return folder


@pytest.fixture(scope="module")
def stopped(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped by a signal to one rank; the step before was saved, too."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    config = tiny(photos, folder, **HUGE, **SHARDED, save_steps=STOP - 1)
    on_ranks(2, folder.parent / "log", train, config, STOP)
    return folder


def gone_on(stopped: Path, folder: Path, photos: Path, ranks: int, **changes) -> Path:
    """A copy of a stopped run, resumed to its end."""
    shutil.copytree(stopped, folder)
    config = tiny(photos, folder, **HUGE | SHARDED | changes, resume="auto")
    on_ranks(ranks, folder.parent / "log", train, config)
    return folder


# ── the same run, however it is shared out ──


def test_sharded_ranks_equal_one_process(one_process: Path, two_ranks: Path) -> None:
    assert_close(two_ranks, one_process)
    one, two = (checkpoint.load(folder / "checkpoint.pt")["optimizer"]["state"] for folder in (one_process, two_ranks))
    for index in one:
        for name in one[index]:
            torch.testing.assert_close(two[index][name], one[index][name], rtol=1e-2, atol=1e-5)
    norms = [json.loads(line)["grad_norm"] for line in (two_ranks / "metrics.jsonl").read_text().splitlines()]
    assert min(norms) > HUGE["clip_grad"], "every gradient was clipped"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_resumes_on_any_number_of_ranks(
    photos: Path,
    tmp_path: Path,
    stopped: Path,
    two_ranks: Path,
    ranks: int,
) -> None:
    """Bit for bit on as many ranks, up to rounding on more, or in one process, which has nothing to shard."""
    assert sharded.load(stopped / "checkpoint.dcp")["step"] == STOP
    folder = gone_on(stopped, tmp_path / "run", photos, ranks)
    if ranks == 2:
        assert_same(weights(folder), weights(two_ranks))
        assert (folder / "metrics.jsonl").read_text().count("\n") == (two_ranks / "metrics.jsonl").read_text().count(
            "\n"
        )
    else:
        assert_close(folder, two_ranks)


def test_a_run_that_was_not_sharded_goes_on_sharded(photos: Path, tmp_path: Path, one_process: Path) -> None:
    config = tiny(photos, tmp_path / "stopped", **HUGE)
    on_ranks(1, tmp_path / "log", train, config, STOP)
    assert checkpoint.load(tmp_path / "stopped" / "checkpoint.pt")["step"] == STOP
    folder = gone_on(tmp_path / "stopped", tmp_path / "run", photos, 2)
    assert_close(folder, one_process)


# ── what a run leaves behind ──


def test_a_finished_run_is_as_any_other(one_process: Path, two_ranks: Path, tmp_path: Path) -> None:
    names = [{file.name for file in folder.iterdir() if file.suffix != ".0"} for folder in (two_ranks, one_process)]
    assert names[0] == names[1] - {"checkpoint.prev1.pt"}, "no shards are left"
    ours, theirs = (checkpoint.load(folder / "checkpoint.pt") for folder in (two_ranks, one_process))
    assert ours.keys() == theirs.keys()
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    encoder = safetensors.torch.load_file(two_ranks / "encoder.safetensors")
    assert torch.equal(encoder["cls_token"], ours["model"]["encoder.cls_token"])
    assert reconstruct(ReconstructConfig(str(two_ranks), out=str(tmp_path / "picture.png"))).stat().st_size > 0


def test_a_stopped_run_can_be_used_as_any_other(stopped: Path, tmp_path: Path) -> None:
    """Fine-tuning, export and reconstruction read the shards."""
    assert not (stopped / "checkpoint.pt").exists()
    for source in (stopped, stopped / "checkpoint.dcp"):
        pretrained = read_pretrained(source)
        assert pretrained.has_decoder and not any(t.is_meta for t in pretrained.state.values())
        create_mae(**pretrained.shape).load_state_dict(pretrained.state)
    assert reconstruct(ReconstructConfig(str(stopped), out=str(tmp_path / "picture.png"))).stat().st_size > 0


def test_clocks_of_ranks_may_differ(photos: Path, tmp_path: Path) -> None:
    """The second rank's clock runs a million times too fast, and `--save_minutes` has passed there after every step."""
    config = tiny(photos, tmp_path / "run", **HUGE, **SHARDED, keep_checkpoints=3)
    on_ranks(2, tmp_path / "log", _train_with_a_fast_clock, config)
    names = ["checkpoint.dcp", "checkpoint.prev1.dcp", "checkpoint.prev2.dcp"]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.dcp")) == names
    assert [sharded.load(tmp_path / "run" / name)["step"] for name in names] == [
        STOP,
        STOP,
        STOP - 1,
    ]  # the last is also that of the stop


def _train_with_a_fast_clock(config: PretrainConfig) -> None:
    def fast(clock: Callable) -> Callable:
        return lambda: clock() if is_first() else 1e6 * clock()

    with replaced(time, "monotonic", fast):
        train(config, STOP)


def test_a_full_disk_on_one_rank_keeps_the_last_checkpoint(photos: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    config = tiny(photos, tmp_path / "run", **HUGE, **SHARDED, resume="auto", save_steps=1)
    on_ranks(2, tmp_path / "log", _fill_the_disk, config)
    assert sharded.load(tmp_path / "run" / "checkpoint.dcp")["step"] == STOP


def _fill_the_disk(config: PretrainConfig) -> None:
    def full(fsync: Callable) -> Callable:
        def on_one(file: int) -> None:
            if not is_first():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(file)

        return on_one

    no_room = r"run/checkpoint.dcp: can't be written on rank 1: No space left"
    with replaced(os, "fsync", full), pytest.raises(storage.CheckpointError, match=no_room):
        pretrain(config)


# ── the step ──


def test_gradients_are_reduced_once_and_must_be_finite(photos: Path, tmp_path: Path) -> None:
    """A rank holds half of everything, its gradients are reduced in the last micro-batch of several, and one that is
    infinite on one rank never reaches the weights of any, nor the disk."""
    config = tiny(photos, tmp_path / "run", **HUGE, **SHARDED, save_steps=1)
    on_ranks(2, tmp_path / "log", _count_reductions_then_break_a_gradient, config)
    state = checkpoint.load(tmp_path / "run" / "checkpoint.dcp")
    assert state["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


class Collectives(TorchDispatchMode):
    """Operations between ranks, by name. torch 2.9's CommDebugMode breaks on blocks that are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace in ("c10d", "_c10d_functional"):
            self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))

    def number(self, kind: str) -> int:
        return sum(kind in name for name in self.names)


def _count_reductions_then_break_a_gradient(config: PretrainConfig) -> None:
    runs = []

    def watching(accumulate_gradients):
        def watched(run, batches, stage):
            with Collectives() as called:
                result = accumulate_gradients(run, batches, stage)
            assert len(run.micro_batches(stage)) > 1
            assert called.number("reduce_scatter") == len(fsdp_units(run.model)) + 1, called.names
            runs.append(run)
            if run.step == 3 and is_first():
                run.model.mask_token.grad.to_local().fill_(float("inf"))
            return result

        return watched

    with (
        replaced(step, "accumulate_gradients", watching),
        pytest.raises(FloatingPointError, match="norm inf at step 3"),
    ):
        pretrain(config)
    model, optimizer = runs[0].model, runs[0].optimizer
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
    for tensors in ([p for p in model.parameters() if p.requires_grad], moments):
        parts = [tensor.to_local() for tensor in tensors]
        assert sum(part.numel() for part in parts) < 0.55 * sum(tensor.numel() for tensor in tensors)
        assert all(torch.isfinite(part).all() for part in parts)


def test_how_gradients_come_together(photos: Path, tmp_path: Path) -> None:
    config = tiny(photos, tmp_path / "run", **HUGE | {"precision": "bf16", "total_batch_size": 8, "fsdp": True})
    on_ranks(2, tmp_path / "log", _gradients_come_together, config)


def _gradients_come_together(config: PretrainConfig) -> None:
    """Of two micro-batches: FSDP2 in bf16 and both kinds of DDP, against one process that has them all."""
    with runtime.start("cpu", "bf16") as rt:

        def gradients(run_config: PretrainConfig, here: Runtime) -> tuple[PretrainRun, dict[str, torch.Tensor], list]:
            run = PretrainRun.create(run_config, here, 20)
            stage, gathers = run.curriculum.stages[0], []
            images = torch.rand(stage.batch_size, 3, 28, 28, generator=torch.Generator().manual_seed(0))
            noise = torch.rand(stage.batch_size, stage.patches, generator=torch.Generator().manual_seed(1))
            for _ in range(2):  # a second step finds what the first one left
                run.optimizer.zero_grad()
                rows = run.micro_batches(stage)
                for mine in rows:
                    with contextlib.nullcontext() if mine is rows[-1] else here.local_gradients(run.network):
                        with Collectives() as called:
                            loss = run.loss(images[mine.start : mine.stop], stage, noise[mine.start : mine.stop])
                            (loss * len(mine) / stage.batch_size * here.world_size).backward()
                        gathers.append(called.number("allgather"))
            found = {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}
            return run, {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in found.items()}, gathers

        alone = replace(rt, rank=0, world_size=1, store=None)
        plain = replace(config, fsdp=False)
        _, expected, _ = gradients(plain, alone)

        def furthest(ours: dict[str, torch.Tensor]) -> float:
            return max(
                float((ours[n] - g).norm() / g.norm()) for n, g in expected.items() if not n.endswith("qkv.bias")
            )

        run, sharded_bf16, gathers = gradients(config, rt)
        units = fsdp_units(run.model)
        assert [len(unit) for unit in units] == [4, 1, 1] and all(
            p.dtype == torch.float32 for p in run.model.parameters()
        )
        assert gathers == [len(units) + 1, 0] * 2, "what is gathered stays until the step's last backward"
        assert furthest(sharded_bf16) < 0.03

        run, mean, _ = gradients(plain, rt)
        assert not run.network.static_graph, "torch loses gradients of no_sync with it"
        assert furthest(mean) < 2e-3
        run, mean, _ = gradients(replace(plain, batch_size=4), rt)
        assert run.network.static_graph and len(run.micro_batches(run.curriculum.stages[0])) == 1
        assert furthest(mean) < 0.02
        _, rounded, _ = gradients(replace(plain, ddp_comm_hook="bf16"), rt)
        assert 1e-4 < furthest(rounded) < 0.02
        assert all(torch.equal(g, g.bfloat16().float()) for g in rounded.values())


def test_recomputing_changes_nothing_but_memory() -> None:
    torch.manual_seed(0)
    model = create_mae(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, decoder_embed_dim=16)
    names, images, noise = list(model.state_dict()), torch.randn(4, 3, 32, 32), torch.rand(4, 16)

    def step() -> tuple[list[torch.Tensor], int]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            model(images, 4, None, noise).pred.square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return gradients, sum(kept)

    before, much = step()
    model.recompute_blocks()
    after, little = step()
    assert list(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert little < 0.2 * much


@torch._dynamo.config.patch(recompile_limit=8)  # torch's default, unless somebody has changed it
def test_blocks_compile_for_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--fsdp --compile` needs it: without breaks, one graph for all blocks alike; a cheap backend stands in."""
    graphs = []
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    )
    shape = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16}
    torch.manual_seed(0)
    eager, compiled = create_mae(**shape, decoder_depth=2), create_mae(**shape, decoder_depth=2)
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_blocks()
    compiled.recompute_blocks()
    for number, size in enumerate((16, 24, 32, 40, 48), start=1):
        images, noise = torch.randn(2, 3, size, size), torch.rand(2, (size // 8) ** 2)
        visible = noise.shape[1] // 2
        for model in (eager, compiled):
            model.zero_grad()
            model(images, visible, None, noise).pred.square().mean().backward()
        for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad)
        assert len(graphs) == 2 * number


# ── mistakes ──


def test_uneven_micro_batches_are_refused_before_they_hang(photos: Path, tmp_path: Path) -> None:
    def run(total: int, ranks: int, **changes) -> PretrainRun:
        config = tiny(photos, tmp_path, **HUGE | SHARDED | {"total_batch_size": total} | changes)
        rt = Runtime(torch.device("cpu"), "fp32", 0, ranks)
        return PretrainRun(config, rt, build_curriculum(config, 20, ranks), None, None, None, None, 0)

    check_micro_batches(run(6, 4))
    check_micro_batches(run(5, 2, fsdp=False))
    with pytest.raises(ValueError, match=r"5 images of 28 px are 1 .* and 2 on another; .* multiple of the 2 ranks"):
        check_micro_batches(run(5, 2))


# ── files from strangers, and from a bad disk ──


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_pickle_beside_the_shards_runs_nothing(copied: Path) -> None:
    """torch.distributed.checkpoint's own `.metadata`, or anything else that is not one of ours."""
    folder, marker = copied / "checkpoint.dcp", copied / "ran"
    for name in (".metadata", "__0.metadata", "__0_0.distcp", "model.safetensors.index.json"):
        (folder / name).write_bytes(pickle.dumps(Malicious(marker)))
    assert checkpoint.load(folder)["step"] == STOP
    assert read_pretrained(copied).has_decoder
    assert not marker.exists()
    dcp.FileSystemReader(folder).read_metadata = None
    with pytest.raises(AttributeError):
        dcp.FileSystemReader(folder).read_metadata()
    assert marker.exists()  # the file was a real attack


def test_a_pickle_in_the_place_of_a_file_runs_nothing(copied: Path) -> None:
    """Even with the right checksum."""
    folder, marker = copied / "checkpoint.dcp", copied / "ran"
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(pickle.dumps(Malicious(marker)))
    state = storage.load(folder / sharded.STATE)
    state["shards"][shard.name] = files.crc32(shard)
    storage.save(state, folder / sharded.STATE)
    with pytest.raises(storage.CheckpointError, match=r"checkpoint.dcp: can't be read") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)
    torch.save({"shards": {}, "step": Malicious(marker)}, folder / sharded.STATE)
    with pytest.raises(storage.CheckpointError, match="could run code"):
        sharded.load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["byte", "cut", "missing", "too many", "no state"])
def test_a_damaged_folder_falls_back_to_the_one_before(
    copied: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = copied / "checkpoint.dcp"
    shard = max(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    if damage == "byte":
        content[-9] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-40])
    elif damage == "missing":
        shard.unlink()
    elif damage == "too many":
        shutil.copy(shard, folder / "shard-00009-model-00001-of-00001.safetensors")
    else:
        (folder / sharded.STATE).unlink()
    state, found = sharded.load_newest(run_folder.checkpoint_in(copied))
    assert (state["step"], found.name) == (STOP - 1, "checkpoint.prev1.dcp")
    assert "going on from" in caplog.text
    shutil.rmtree(folder)  # as a kill between two renamings leaves it
    assert run_folder.checkpoint_in(copied).name == "checkpoint.dcp"
    assert sharded.load_newest(run_folder.checkpoint_in(copied))[0]["step"] == STOP - 1


def test_a_run_goes_on_from_the_folder_before_a_damaged_one(
    photos: Path,
    copied: Path,
    two_ranks: Path,
) -> None:
    min((copied / "checkpoint.dcp").glob("*.safetensors")).unlink()
    pretrain(tiny(photos, copied, **HUGE | SHARDED, resume="auto"))
    assert_close(copied, two_ranks)


def test_a_folder_of_shards_counts_as_a_run(photos: Path, copied: Path) -> None:
    config = tiny(photos, copied, **HUGE)
    (copied / "metrics.jsonl").unlink()
    with pytest.raises(FileExistsError, match=r"already holds a run \(checkpoint.dcp\)"):
        pretrain(config)
    pretrain(replace(config, overwrite=True, epochs=0.6))
    assert not list(copied.glob("*.dcp")) and (copied / "checkpoint.pt").exists()

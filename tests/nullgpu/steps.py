"""A pretraining step on the null GPU: what the cases here start from."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist

from mae_et.engine import runtime
from mae_et.engine.pretrain import warm_up
from mae_et.engine.run import PretrainRun
from mae_et.engine.step import take_step
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import Stage
from mae_et.plan.flags import parse
from mae_et.plan.shapes import height_width
from nullgpu.counters import real_reads

#: Two blocks of encoder and of decoder, in all three stages of EfficientTrain++.
SMALL = (
    "--model mae_vit_tiny_patch16 --depth 2 --decoder_depth 2 --decoder_embed_dim 64 --decoder_num_heads 2 "
    "--curriculum et_pp --epochs 400 --batch_size 16 --total_batch_size 16"
)


@contextlib.contextmanager
def started(flags: str, ranks: int = 1) -> Iterator[PretrainRun]:
    """A warm run of these flags, on data that nobody reads; as rank 0 of several that are all alike."""
    # Its clock tells nothing, so the fastest attention would be any.
    config = parse(PretrainConfig, ["--attention", "flash", *flags.split(), "--data_path", "none"])
    gc.collect()  # memory of earlier runs, which hold themselves in circles
    torch._C._cuda_clearCublasWorkspaces()  # one for each stream
    torch.cuda.empty_cache()
    with contextlib.ExitStack() as stack:
        if ranks > 1:
            world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
            stack.enter_context(mock.patch.dict("os.environ", world))
            alone = [(dist.HashStore(), 0, ranks)]
            stack.enter_context(mock.patch.object(runtime, "rendezvous", return_value=iter(alone)))
            stack.enter_context(real_reads())
            stack.callback(lambda: dist.is_initialized() and dist.destroy_process_group())  # after an error, too
        rt = stack.enter_context(runtime.start("cuda", "bf16", deterministic=config.deterministic))
        with torch.device(rt.device):  # weights are drawn where drawing them takes no time
            run = PretrainRun.create(config, rt, 1281167)
        warm_up(run)
        yield run
        run.graphs.clear()  # they are of DDP's buffers, too


def pinned_batches(run: PretrainRun, stage: Stage) -> list[torch.Tensor]:
    """Micro-batches of one step, uint8, as the loader's pinning thread leaves them."""
    shape = run.config.in_chans, *height_width(stage.loader_px)
    return [torch.zeros(len(rows), *shape, dtype=torch.uint8).pin_memory() for rows in run.micro_batches(stage)]


def steady(run: PretrainRun, stage: Stage) -> list[torch.Tensor]:
    """Begin the stage and take steps until all are alike; returns micro-batches for :func:`step`."""
    batches = pinned_batches(run, stage)
    torch.cuda.empty_cache()
    for _ in range(2):
        step(run, stage, batches)
    gc.collect()  # of DDP's first buckets, which it has replaced
    return batches


def step(run: PretrainRun, stage: Stage, batches: list[torch.Tensor]) -> None:
    take_step(run, iter(batches), stage, lr=1e-4)
    run.step = 1 - run.step  # another step's noise, of the same stage

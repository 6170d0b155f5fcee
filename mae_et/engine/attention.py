"""Which of torch's kernels computes attention on a CUDA device: all are timed at the shapes of a stage.

What torch would choose depends on its version, and none is best everywhere: flash works on 128 tokens at a time,
however few there are; cuDNN plans anew for each shape; math writes all weights out.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..plan.curriculum import Stage
from ..plan.shapes import ModelShape, show_size
from .runtime import Runtime

log = logging.getLogger(__name__)

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DETERMINISTIC = ("flash", "math")
WARM_CALLS, CALLS = 3, 20


class Attention(NamedTuple):
    """One attention of a stage, as all blocks of the encoder, or of the decoder, have it."""

    blocks: int
    heads: int
    queries: int
    keys: int
    width: int
    """Of a head."""
    cross: bool = False
    """q comes from one linear layer and k and v from another, instead of all three from one."""


def attentions(shape: ModelShape, stage: Stage) -> tuple[Attention, Attention]:
    """Of the encoder and of the decoder."""
    context = 1 + stage.num_visible
    every = context + stage.num_predicted
    cross = shape.decoder == "cross"
    queries, keys = (stage.num_predicted, context) if cross else (every, every)
    heads, width = shape.decoder_num_heads, shape.decoder_embed_dim
    return (
        Attention(shape.depth, shape.num_heads, context, context, shape.embed_dim // shape.num_heads),
        Attention(shape.decoder_depth, heads, queries, keys, width // heads, cross),
    )


def using(backend: str | None) -> contextlib.AbstractContextManager:
    """Context in which attention, forward and backward, is a backend's; None: whatever torch chooses."""
    return sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext()


class Choice(NamedTuple):
    backend: str | None
    """None: torch's choice."""
    milliseconds: dict[str, float] = {}  # noqa: RUF012
    """Of each backend that was timed, over all blocks."""


def choose(wanted: str, shape: ModelShape, stage: Stage, images: int, rt: Runtime) -> Choice:
    """The backend for micro-batches of so many images.

    wanted: auto, the fastest on rank 0, or a backend; flash on a device with --deterministic, where it can. Only CUDA
    has a choice. ValueError for a backend that can't compute this. All ranks call it.
    """
    if rt.device.type != "cuda":
        if wanted != "auto":
            raise ValueError(f"--attention {wanted} is for CUDA devices, not for {rt.device.type}; leave it at auto")
        return Choice(None)
    calls = [(one.blocks, call_of(one, images, rt)) for one in attentions(shape, stage)]
    where = f"{images} images of {show_size(stage.size_px)} px in {rt.precision}"
    if wanted != "auto":
        if problem := _problem(wanted, calls):
            raise ValueError(f"--attention {wanted} can't compute {where} ({problem}); choose another one, or auto")
        return Choice(wanted)
    if torch.are_deterministic_algorithms_enabled():  # so must the choice be
        return Choice(next((name for name in DETERMINISTIC if not _problem(name, calls)), None))
    times = {}
    if rt.is_main:
        for name in BACKENDS:
            if not _problem(name, calls):
                with using(name):
                    times[name] = sum(blocks * milliseconds(call, rt.device) for blocks, call in calls)
    times = rt.from_main(times)
    best = min(times, key=times.__getitem__, default=None)  # none, if memory is too small for any
    log.info("attention of %s: %s", where, ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()))
    return Choice(best, {name: round(ms, 3) for name, ms in times.items()})


def call_of(one: Attention, images: int, rt: Runtime) -> Callable[[], None]:
    """Forward and backward of one attention; q, k and v [B, heads, tokens, width] lie as a linear layer leaves them."""
    dtype = torch.bfloat16 if rt.precision == "bf16" else torch.float32

    def blank(tokens: int, parts: int = 1) -> tuple[Tensor, ...]:
        packed = torch.full((images, tokens, parts, one.heads, one.width), 0.5, dtype=dtype, device=rt.device)
        return packed.permute(2, 0, 3, 1, 4).unbind(0)

    qkv = (*blank(one.queries), *blank(one.keys, 2)) if one.cross else blank(one.queries, 3)
    qkv, (gradient,) = [part.detach().requires_grad_() for part in qkv], blank(one.queries)

    def call() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*qkv), qkv, gradient)

    return call


def _problem(name: str, calls: list[tuple[int, Callable[[], None]]]) -> str:
    """Why a backend can't compute this, here and now; "" if it can."""
    try:
        with using(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch gives its reasons as warnings
            for _, call in calls:
                call()
    except RuntimeError as error:  # not supported, or out of memory
        return str(error).partition("\n")[0]
    return ""


def milliseconds(call: Callable[[], None], device: torch.device) -> float:
    """Of a call on the device, whose queue is kept full: the host's time to launch kernels must not count."""
    for _ in range(WARM_CALLS):
        call()
    began, ended = (torch.Event(device, enable_timing=True) for _ in range(2))
    large = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
    for _ in range(5):  # 8 ms of an H100
        torch.mm(large, large)
    began.record()
    for _ in range(CALLS):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / CALLS

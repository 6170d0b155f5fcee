"""What a training step takes on a GPU, before there is one: memory, launches, seconds of the device and of its host.

Memory and launches are counted formulas, which tests hold against torch's own allocator and code (tests/nullgpu).
Seconds are estimates for an H100, not measurements: each constant says where it comes from. Everything is for bf16
autocast with fused attention, and blocks that are not compiled, which need a little more of each.

Not in memory: the driver's own, workspaces of cuDNN and NCCL, and what the allocator reserves over what is allocated; 1
to 2 GiB and up to a tenth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .build import shape_of
from .config import PretrainConfig
from .curriculum import Curriculum, Stage
from .shapes import ModelShape, height_width


@dataclass(frozen=True)
class GpuStep:
    """What one step of a stage is for each device and its host."""

    shape: ModelShape
    stage: Stage
    images: float
    """Of a micro-batch, on average."""
    micro_batches: int
    launches: int
    """Of a micro-batch."""
    update_launches: int
    """Of a step, beside those: what Muon takes more than AdamW."""
    host_seconds: float
    peak_memory_bytes: int | None
    """None where no formula holds: in float32, with --bf16_residual, and where the model is sharded."""

    @classmethod
    def of(cls, config: PretrainConfig, plan: Curriculum, stage: Stage, devices: int) -> GpuStep:
        """A step of one of the stages of `plan`, which is the configuration's."""
        shape, hog, recompute = shape_of(config), config.target == "hog", config.activation_checkpointing
        muon = config.opt == "muon"
        sharded = config.fsdp and devices > 1
        graphs = config.cuda_graphs != "off" and not sharded
        rows, count = math.ceil(stage.batch_size / devices), stage.micro_batches(config.batch_size, devices)
        work = launches(shape, hog=hog, recompute=recompute, ranks=devices)
        peak = None
        if config.precision != "fp32" and not config.bf16_residual and not sharded:
            copies = 1 if graphs else (count > 1) + (devices > 1)  # graphs add to gradients that stay where they are
            size = math.ceil(rows / count)
            peak = peak_memory_bytes(shape, stage, size, hog=hog, gradients=copies, recompute=recompute, muon=muon)
            peak += max(_arriving(config, s, devices) for s in plan.stages)
        update = muon_launches(shape) if muon else 0
        host = count * host_seconds(work, graphs) + host_seconds(update, graphs=False)
        return cls(shape, stage, rows / count, count, work, update, host, peak)

    def utilisation(self, device_flops: float) -> float:
        """Estimated MFU while the device is not waited for."""
        return utilisation(self.shape, self.stage, self.images, device_flops, self.launches)


def _arriving(config: PretrainConfig, stage: Stage, devices: int) -> int:
    """Bytes of two micro-batches as they leave the loader: one arrives while the device works on the other."""
    size = math.ceil(math.ceil(stage.batch_size / devices) / stage.micro_batches(config.batch_size, devices))
    return 2 * size * config.in_chans * math.prod(height_width(stage.loader_px))


# ── memory ──

FLOAT, BF16, INDEX = 4, 2, 8
"""Bytes of one number."""
WORKSPACE_BYTES = 40 * 2**20
"""cuBLAS's workspace on an H100, 32 MiB, and the tables of positions."""
HOG_IMAGES = 8.45
"""Float32 images that the HOG target takes at its height, gradients and histograms; measured, the same at all sizes."""
RECOMPUTED_BLOCK = 0.94
"""Of a block's kept bytes, what its second run and its backward pass take at their height; measured."""


def peak_memory_bytes(
    model: ModelShape,
    stage: Stage,
    images: int,
    *,
    hog: bool,
    gradients: int = 0,
    recompute: bool = False,
    muon: bool = False,
) -> int:
    """Peak of a step with micro-batches of `images` in a stage, on each device, its optimiser's state included.

    Right to 2 %, or 10 % with `recompute`.

    gradients: copies of them that live while the forward pass runs: one of several micro-batches, one in DDP's buckets.
    recompute: only the input of each block is kept (--activation_checkpointing), and no weights in bf16.
    """
    parameters = model.num_parameters
    # Weights and two moments, of which Muon keeps one for the matrices of blocks.
    state = FLOAT * (parameters * (3 + gradients) - muon * sum(numbers for numbers, _ in _matrices(model)))
    encoder, decoder, rest = _kept(model, stage)
    blocks = encoder * model.depth + decoder * model.decoder_depth
    pixels = FLOAT * model.in_chans * math.prod(height_width(stage.size_px))
    target = FLOAT * stage.num_predicted * model.target_dim
    if recompute:
        inputs = FLOAT * _residuals(model, stage)
        kept = inputs + rest
        # The last block runs again when the images are no longer needed.
        backward = kept + target + RECOMPUTED_BLOCK * (decoder if model.decoder_depth else encoder)
    else:
        kept = blocks + rest
        backward = kept + target
    # Before the backward pass: HOG's tensors, or target, prediction, their difference and its square.
    forward = kept + pixels + (HOG_IMAGES * pixels if hog else 4 * target)
    casts = 0 if recompute else BF16 * parameters
    # At the end of the backward pass all gradients are there.
    end = encoder * images + (0 if gradients else FLOAT * parameters)
    # The device crops images of full size, two at a time of them in float32, while nothing else is there.
    crop = 2 * FLOAT * model.in_chans * math.prod(height_width(stage.loader_px or stage.size_px)) * images
    # Momenta that are made orthogonal, all of one shape together: in float32 one by one and as one, in bf16 twice.
    iteration = max((2 * FLOAT + 2 * BF16) * numbers + 2 * BF16 * squares for numbers, squares in _matrices(model))
    update = (0 if gradients else FLOAT * parameters) + muon * iteration
    step = max(casts + images * max(forward, backward), casts + end, crop, update)
    return int(state + WORKSPACE_BYTES + step)


def _matrices(model: ModelShape) -> list[tuple[int, int]]:
    """Numbers in all matrices of blocks that have one shape, and in their products with their transposes."""
    found = []
    for width, depth in ((model.embed_dim, model.depth), (model.decoder_embed_dim, model.decoder_depth)):
        hidden = int(width * model.mlp_ratio)
        found += [(depth * 4 * width**2,) * 2, (depth * 2 * width * hidden, depth * 2 * min(width, hidden) ** 2)]
    return found


def _kept(model: ModelShape, stage: Stage) -> tuple[float, float, float]:
    """Bytes that the backward pass waits for, per image: of a block of the encoder, of the decoder, of all else.

    A block keeps its residual stream twice in float32, and in bf16 what its linear layers and attention read and GELU's
    input; layer norm keeps two numbers a token, attention one for each head.
    """
    context, predicted, tokens = 1 + stage.num_visible, stage.num_predicted, _decoder_tokens(model, stage)
    width, narrow, ratio = model.embed_dim, model.decoder_embed_dim, model.mlp_ratio
    heads = FLOAT * model.decoder_num_heads
    encoder = context * ((20 + 4 * ratio) * width + 16 + FLOAT * model.num_heads)
    if model.decoder == "cross":
        decoder = predicted * ((16 + 4 * ratio) * narrow + 16 + heads) + context * (6 * narrow + 8)
        stream = predicted * FLOAT * narrow + context * FLOAT * narrow
    else:
        decoder = tokens * ((20 + 4 * ratio) * narrow + 16 + heads)
        stream = tokens * FLOAT * narrow
    patches = stage.num_visible * BF16 * model.patch_size**2 * model.in_chans
    ends = context * (FLOAT + BF16) * width + stream + predicted * BF16 * (narrow + model.target_dim)
    return encoder, decoder, patches + ends + INDEX * (stage.patches + predicted)


def _decoder_tokens(model: ModelShape, stage: Stage) -> int:
    return stage.num_predicted + (0 if model.decoder == "cross" else 1 + stage.num_visible)


def _residuals(model: ModelShape, stage: Stage) -> int:
    """Numbers in the inputs of all blocks, per image."""
    encoder = model.depth * (1 + stage.num_visible) * model.embed_dim
    return encoder + model.decoder_depth * _decoder_tokens(model, stage) * model.decoder_embed_dim


# ── seconds ──
#
# The host asks for kernels one by one, the device runs them as they come; a step takes as long as the slower one.

LAUNCHES_PER_BLOCK, LAUNCHES_PER_CROSS_BLOCK, LAUNCHES_PER_RECOMPUTED_BLOCK = 58, 74, 18
OTHER_LAUNCHES, HOG_LAUNCHES, DDP_LAUNCHES = 130, 55, 252
MUON_LAUNCHES_PER_WEIGHT, MUON_LAUNCHES_PER_SHAPE = 10, 22
"""Kernels, matrix products and memory sets of a micro-batch, counted; of DDP a copy for each parameter, for ViT-B."""
HOST_SECONDS_PER_LAUNCH = 12.5e-6
"""Estimate: half of the 21 µs of Python and torch measured on an AMD Zen 3, for hosts of H100s, and 2 µs of driver."""
HOST_SECONDS_PER_GRAPH = 2e-3
"""Estimate for what is left with --cuda_graphs, likewise: 4 to 5 ms for a step, measured, halved."""
DEVICE_SECONDS_PER_LAUNCH = 2.2e-6
"""Estimate: the shortest kernel."""
PRODUCTS = 0.24
"""Estimate: share of the peak in all but attention, by bytes and FLOPs of each operator of ViT-B in a step (roofline of
2.6 TB/s and 700 TFLOP/s in whole tiles and waves, of an H100's 989)."""
ATTENTION, ATTENTION_TILE = 1 / 3, 128
"""Estimate: share of the peak in FlashAttention 2, which works in whole tiles of 128 tokens, however few there are."""


def launches(model: ModelShape, *, hog: bool, recompute: bool = False, ranks: int = 1) -> int:
    """Kernels and the like of one micro-batch, forward and backward, at any size."""
    per_decoder_block = LAUNCHES_PER_CROSS_BLOCK if model.decoder == "cross" else LAUNCHES_PER_BLOCK
    blocks = model.depth + model.decoder_depth
    return (
        LAUNCHES_PER_BLOCK * model.depth
        + per_decoder_block * model.decoder_depth
        + LAUNCHES_PER_RECOMPUTED_BLOCK * blocks * recompute
        + OTHER_LAUNCHES
        + HOG_LAUNCHES * hog
        + DDP_LAUNCHES * blocks // 20 * (ranks > 1)
    )


def muon_launches(model: ModelShape) -> int:
    """Kernels of Muon's update in a step: a few for each weight, and the iteration for the matrices of one shape."""
    weights = 4 * model.depth + (5 if model.decoder == "cross" else 4) * model.decoder_depth
    return MUON_LAUNCHES_PER_WEIGHT * weights + MUON_LAUNCHES_PER_SHAPE * 4


def host_seconds(launches: int, graphs: bool) -> float:
    """What the host takes to ask for one micro-batch."""
    return HOST_SECONDS_PER_GRAPH if graphs else launches * HOST_SECONDS_PER_LAUNCH


def utilisation(model: ModelShape, stage: Stage, images: float, device_flops: float, launches: int) -> float:
    """MFU: the share of a device's peak that a micro-batch of `images` achieves while its kernels run."""
    context, queries = 1 + stage.num_visible, stage.num_predicted
    tokens = queries if model.decoder == "cross" else context + queries
    keys = context if model.decoder == "cross" else tokens
    layers = (
        (model.depth, model.embed_dim, context, context),
        (model.decoder_depth, model.decoder_embed_dim, tokens, keys),
    )
    # 4 FLOPs forward and 10 backward for each pair of query and key and each channel.
    needed = sum(depth * width * 12 * q * k for depth, width, q, k in layers)
    done = sum(depth * width * 14 * _tiles(q) * _tiles(k) for depth, width, q, k in layers)
    products = (stage.flops_per_image - needed) / PRODUCTS
    busy = images * (products + done / ATTENTION) / device_flops + launches * DEVICE_SECONDS_PER_LAUNCH
    return images * stage.flops_per_image / device_flops / busy


def _tiles(tokens: int) -> int:
    return math.ceil(tokens / ATTENTION_TILE) * ATTENTION_TILE

"""What training costs: FLOPs of (model, stage) as a formula, and the ledger of what a run has spent.

FLOPs are 2 per multiply-add of matrix products, as PyTorch's counter counts them; the formula is needed because that
counter sees nothing of fused attention on CPU (pytorch issue 195460). Tests hold the two equal on the meta device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from .curriculum import Curriculum, Stage
from .shapes import SPECTRAL, ModelShape, SizePx, height_width, of_file


def flops_per_image(model: ModelShape, stage: Stage, training: bool = True) -> int:
    """FLOPs of the model on one image at a stage (only its `num_visible` and `num_predicted` matter).

    model: a shape, or a model, which has the same attributes.

    Patch embedding and encoder on the visible patches, decoder on visible and predicted ones (a `cross` one: queries
    of the predicted, keys and values of the visible ones), head on predicted ones.
    training: forward and backward, which costs twice the forward, except that no gradient goes to the pixels.
    """
    visible, predicted = stage.num_visible, stage.num_predicted
    width, mlp_ratio = model.decoder_embed_dim, model.mlp_ratio
    if model.decoder == "cross":
        block = _cross_block(predicted, 1 + visible, width, mlp_ratio)
    else:
        block = _block(1 + visible + predicted, width, mlp_ratio)
    embedding = _linear(visible, model.patch_size**2 * model.in_chans, model.embed_dim)
    forward = (
        embedding
        + model.depth * _block(1 + visible, model.embed_dim, model.mlp_ratio)
        + _linear(1 + visible, model.embed_dim, model.decoder_embed_dim)
        + model.decoder_depth * block
        + _linear(predicted, model.decoder_embed_dim, model.target_dim)
    )
    return 3 * forward - embedding if training else forward


def input_flops_per_image(full_size_px: SizePx, stage: Stage, in_chans: int, operator: str = "fourier") -> int:
    """FLOPs of `low_frequency_input` on the device, part of the method's cost; other operators run in the loader."""
    crop = crop_flops(full_size_px, stage.size_px, operator) if operator in SPECTRAL else 0
    there_and_back = 2 * crop_flops(stage.size_px, stage.cutoff_px, "dct") if stage.cutoff_px else 0
    return in_chans * (crop + there_and_back)


def crop_flops(full_size: SizePx, size: SizePx, operator: str = "fourier") -> int:
    """FLOPs (2 per multiply-add) of `low_frequency_crop` for one channel of one image."""
    (H, W), (h, w) = height_width(full_size), height_width(size)
    # An even size of a Fourier crop carries one row more, the unpaired Nyquist term.
    columns = w + (operator == "fourier" and w < W and w % 2 == 0)
    rows = h + (operator == "fourier" and h < H and h % 2 == 0)
    return 2 * (H * W * columns * (w < W) + rows * H * columns * (h < H))


def encoder_flops_per_image(model: ModelShape, num_patches: int) -> int:
    """Forward FLOPs of the encoder on all patches and the class token: what features, probes and fine-tuning use."""
    return _linear(num_patches, model.patch_size**2 * model.in_chans, model.embed_dim) + model.depth * _block(
        1 + num_patches, model.embed_dim, model.mlp_ratio
    )


NEWTON_SCHULZ_STEPS = 5
"""Of Muon, to make a matrix orthogonal (Jordan et al. 2024)."""


def muon_flops(model: ModelShape) -> int:
    """FLOPs of a step of Muon on one device: three products of an m × n matrix, m ≤ n, in each Newton–Schulz step.

    Of the matrices of the blocks; queries, keys and values are one each.
    """
    widths = (model.embed_dim, model.depth), (model.decoder_embed_dim, model.decoder_depth)
    flops = 0
    for width, depth in widths:
        hidden = int(width * model.mlp_ratio)
        flops += depth * (4 * _newton_schulz(width, width) + 2 * _newton_schulz(width, hidden))
    return NEWTON_SCHULZ_STEPS * flops


def _newton_schulz(rows: int, columns: int) -> int:
    m, n = sorted((rows, columns))
    return _linear(m, n, m) + _linear(m, m, m) + _linear(m, m, n)


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _block(tokens: int, width: int, mlp_ratio: float) -> int:
    hidden = int(width * mlp_ratio)
    linears = _linear(tokens, width, 3 * width) + _linear(tokens, width, width) + 2 * _linear(tokens, width, hidden)
    return linears + 2 * _linear(tokens, width, tokens)  # q·kᵀ and attention·v


def _cross_block(queries: int, context: int, width: int, mlp_ratio: float) -> int:
    hidden = int(width * mlp_ratio)
    linears = 2 * _linear(queries, width, width) + _linear(context, width, 2 * width)
    linears += 2 * _linear(queries, width, hidden)
    return linears + 2 * _linear(queries, width, context)  # q·kᵀ and attention·v


@dataclass
class StageCost:
    """What one stage has cost so far. Counts are over all devices; seconds are wall-clock seconds of the run."""

    size_px: SizePx
    steps: int = 0
    images: int = 0
    """Images seen: rows of batches."""
    visible_patches: int = 0
    predicted_patches: int = 0
    flops: float = 0.0
    train_seconds: float = 0.0
    """Steps: forward, backward, update. Excludes the fields of seconds below."""
    data_seconds: float = 0.0
    """Waiting for the loader."""
    eval_seconds: float = 0.0
    """Pictures, checkpoints, evaluation."""
    warmup_seconds: float = 0.0
    """Compiling and warming the stage's shapes."""
    probe_seconds: float = 0.0
    """Measuring online quality, see --probe_every."""
    probe_flops: float = 0.0
    """Forward passes of the encoder for that, on full-size images; not part of `flops`."""
    eval_flops: float = 0.0
    """Forward passes of fine-tuning's evaluations, of averaged weights too; not part of `flops`."""
    peak_memory_bytes: int = 0
    energy_joules: float = 0.0
    """Of the devices, or of the CPU packages, between reports; 0 where they don't tell."""
    decoded_images: int = 0
    """Images decoded for those seen, by the plan; what a resumed run decodes again for its buffer isn't counted."""
    replay_bytes: int = 0
    """The replay buffer, over all devices."""

    @property
    def seconds(self) -> float:
        """Seconds of training as a user feels them: steps and waiting for data."""
        return self.train_seconds + self.data_seconds

    @property
    def data_wait(self) -> float:
        """Share of training time spent waiting for data."""
        return self.data_seconds / self.seconds if self.seconds else 0.0


@dataclass
class Ledger:
    """The cost of a run, stage by stage. It is saved in the checkpoint, so it survives interruptions."""

    stages: list[StageCost] = field(default_factory=list)

    @classmethod
    def of(cls, curriculum: Curriculum) -> Ledger:
        return cls([StageCost(stage.size_px, replay_bytes=stage.replay_bytes) for stage in curriculum.stages])

    def add(self, index: int, stage: Stage, *, train_seconds: float, data_seconds: float) -> None:
        """Book one optimiser step of stage number `index`."""
        account = self.stages[index]
        account.decoded_images += stage.decoded_before(account.steps + 1) - stage.decoded_before(account.steps)
        account.steps += 1
        account.images += stage.batch_size
        account.visible_patches += stage.batch_size * stage.num_visible
        account.predicted_patches += stage.batch_size * stage.num_predicted
        account.flops += stage.flops_per_step
        account.train_seconds += train_seconds
        account.data_seconds += data_seconds

    @property
    def total(self) -> StageCost:
        """Sums over the stages; the peak of the peaks for memory; the last stage's size."""
        total = StageCost(self.stages[-1].size_px)
        for name in (f.name for f in dataclasses.fields(StageCost) if f.name != "size_px"):
            over_stages = max if name.endswith("_bytes") else sum
            setattr(total, name, over_stages(getattr(account, name) for account in self.stages))
        return total

    def state_dict(self) -> dict:
        """{"stages": [...], "total": {...}} of plain numbers: what ledger.json holds."""
        return {"stages": [dataclasses.asdict(a) for a in self.stages], "total": dataclasses.asdict(self.total)}

    @classmethod
    def from_state_dict(cls, state: dict) -> Ledger:
        return cls([of_file(StageCost, account, "the ledger") for account in state["stages"]])

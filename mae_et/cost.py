"""What training costs: FLOPs of (model, stage) as a formula, and the ledger of what a run has spent.

FLOPs are 2 per multiply-add of matrix products, as PyTorch's counter counts them; the formula is needed because that
counter sees nothing of fused attention on CPU (pytorch issue 195460). Tests hold the two equal on the meta device.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .curriculum import Curriculum, SizePx, Stage
from .model import MaskedAutoencoder
from .spectral import crop_flops


def flops_per_image(model: MaskedAutoencoder, stage: Stage, training: bool = True) -> int:
    """FLOPs of the model on one image at a stage (only its `num_visible` and `num_predicted` matter).

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


def input_flops_per_image(full_size_px: SizePx, size_px: SizePx, in_chans: int, operator: str = "fourier") -> int:
    """FLOPs of the spectral crop on the device, part of the method's cost; the other operators run in the loader."""
    return in_chans * crop_flops(full_size_px, size_px) if operator == "fourier" else 0


def encoder_flops_per_image(model: MaskedAutoencoder, num_patches: int) -> int:
    """Forward FLOPs of the encoder on all patches and the class token: what features, probes and fine-tuning use."""
    return _linear(num_patches, model.patch_size**2 * model.in_chans, model.embed_dim) + model.depth * _block(
        1 + num_patches, model.embed_dim, model.mlp_ratio
    )


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
class Account:
    """What one stage has cost so far. Counts are over all devices; seconds are wall-clock seconds of the run."""

    size_px: SizePx
    steps: int = 0
    images: int = 0
    """Images seen: rows of batches."""
    visible_patches: int = 0
    predicted_patches: int = 0
    flops: float = 0.0
    train_seconds: float = 0.0
    """Steps: forward, backward, update. Neither of the seconds below is in it."""
    data_seconds: float = 0.0
    """Waiting for the loader."""
    eval_seconds: float = 0.0
    """Pictures, checkpoints, evaluation."""
    warmup_seconds: float = 0.0
    """Compiling and warming the stage's shapes."""
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

    stages: list[Account] = field(default_factory=list)

    @classmethod
    def of(cls, curriculum: Curriculum) -> Ledger:
        return cls([Account(stage.size_px, replay_bytes=stage.replay_bytes) for stage in curriculum.stages])

    def add(self, index: int, stage: Stage, *, train_seconds: float, data_seconds: float) -> None:
        """Book one optimiser step of stage number `index`."""
        account = self.stages[index]
        account.decoded_images += stage.decoded_before(account.steps + 1) - stage.decoded_before(account.steps)
        account.steps += 1
        account.images += stage.batch_size
        account.visible_patches += stage.batch_size * stage.num_visible
        account.predicted_patches += stage.batch_size * stage.num_predicted
        account.flops += stage.batch_size * stage.flops_per_image
        account.train_seconds += train_seconds
        account.data_seconds += data_seconds

    @property
    def total(self) -> Account:
        """Sums over the stages; the peak of the peaks for memory; the last stage's size."""
        total = Account(self.stages[-1].size_px)
        for name in (f.name for f in dataclasses.fields(Account) if f.name != "size_px"):
            over_stages = max if name.endswith("_bytes") else sum
            setattr(total, name, over_stages(getattr(account, name) for account in self.stages))
        return total

    def state_dict(self) -> dict:
        """{"stages": [...], "total": {...}} of plain numbers: what ledger.json holds."""
        return {"stages": [dataclasses.asdict(a) for a in self.stages], "total": dataclasses.asdict(self.total)}

    @classmethod
    def from_state_dict(cls, state: dict) -> Ledger:
        return cls([Account(**account) for account in state["stages"]])


POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules used since the last reading, as the devices tell.

    A CUDA device has a counter (read through nvidia-ml-py, where that is installed): this rank's, times the number of
    devices, since asking the others would make them wait. CPU packages have RAPL (Linux's powercap interface, which
    often only root may read): those of this machine.
    """

    def __init__(self, device: torch.device, devices: int = 1) -> None:
        self._devices, self._gpu, self._packages = devices, None, []
        if device.type == "cuda":
            self._gpu = _gpu_millijoules(device)
        else:
            found = sorted(POWERCAP.glob("intel-rapl:[0-9]*"))
            self._packages = [package for package in found if package.name.count(":") == 1]  # not parts of packages
        self._last = self._read()

    def since(self) -> float:
        """Joules since this was last called; 0 where nothing tells."""
        before, self._last = self._last, self._read()
        if before is None or self._last is None:
            return 0.0
        # RAPL's counters run over.
        return sum(max(0.0, now - then) for now, then in zip(self._last, before, strict=True))

    def _read(self) -> list[float] | None:
        if self._gpu:
            return [self._devices * self._gpu() / 1e3]  # millijoules
        try:
            return [int((package / "energy_uj").read_text()) / 1e6 for package in self._packages] or None
        except OSError:
            return None


def _gpu_millijoules(device: torch.device) -> Callable[[], int] | None:
    """Reads a CUDA device's energy counter; None where nvidia-ml-py isn't installed, or the device (or a MIG part of
    one) doesn't tell."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return functools.partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)


def peak_memory_bytes(device: torch.device) -> int:
    """High-water mark of memory: allocated on a CUDA device since its last reset, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # no high-water mark in the standard library
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux

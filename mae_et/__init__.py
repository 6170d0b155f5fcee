"""Masked-autoencoder pretraining whose inputs start small and low-frequency and grow, on the engine of vanilla MAE."""

import importlib
import os

# Both before torch is loaded. Idle OpenMP threads spin for a fraction of a millisecond, then sleep: asleep at once
# (OMP_WAIT_POLICY=passive) they must be woken for every small operation, and a tiny ViT trains at half the speed;
# spinning on as by default, they starve other processes on the same cores, and a step beside one takes 8 times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# Put large CPU tensors on pages of 2 MiB, where the system allows it: fewer page faults (see engine.runtime).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

#: Public name -> the module that has it. Loaded when first asked for: planning needs no torch.
_HOMES = {
    "Curriculum": "plan.curriculum",
    "MaskedAutoencoder": "model",
    "Stage": "plan.curriculum",
    "create_mae": "model",
    "efficient_train": "plan.schedules",
    "efficient_train_pp": "plan.schedules",
    "flops_per_image": "plan.cost",
    "hog_target": "targets",
    "low_frequency_crop": "spectral",
    "pixel_target": "targets",
    "pretrain": "engine.pretrain",
    "vanilla": "plan.schedules",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

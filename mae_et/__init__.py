"""Masked-autoencoder pretraining whose inputs start small and low-frequency and grow, on the engine of vanilla MAE."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of _HOMES, for type checkers and editors; `as` says that they are public
    from .engine.pretrain import pretrain as pretrain
    from .model import MaskedAutoencoder as MaskedAutoencoder
    from .model import create_mae as create_mae
    from .plan.cost import flops_per_image as flops_per_image
    from .plan.curriculum import Curriculum as Curriculum
    from .plan.curriculum import Stage as Stage
    from .plan.schedules import efficient_train as efficient_train
    from .plan.schedules import efficient_train_pp as efficient_train_pp
    from .plan.schedules import vanilla as vanilla
    from .spectral import low_frequency_crop as low_frequency_crop
    from .targets import hog_target as hog_target
    from .targets import pixel_target as pixel_target

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

"""Masked-autoencoder pretraining whose inputs start small and low-frequency and grow, on the engine of vanilla MAE."""

import os

# Both before torch is loaded. Idle OpenMP threads spin for a fraction of a millisecond, then sleep: asleep at once
# (OMP_WAIT_POLICY=passive) they must be woken for every small operation, and a tiny ViT trains at half the speed;
# spinning on as by default, they starve other processes on the same cores, and a step beside one takes 8 times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# Large tensors on a CPU in pages of 2 MiB, where the system allows it: fewer faults and table walks (see also runtime).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from .cost import flops_per_image
from .curriculum import Curriculum, Stage, efficient_train, efficient_train_pp, vanilla
from .model import MaskedAutoencoder, create_mae
from .spectral import low_frequency_crop
from .targets import hog_target, pixel_target

__all__ = [
    "Curriculum",
    "MaskedAutoencoder",
    "Stage",
    "create_mae",
    "efficient_train",
    "efficient_train_pp",
    "flops_per_image",
    "hog_target",
    "low_frequency_crop",
    "pixel_target",
    "pretrain",
    "vanilla",
]


def __getattr__(name: str):
    """`pretrain` brings data loading and logging along; it is imported when first asked for."""
    if name == "pretrain":
        import importlib

        return importlib.import_module(".pretrain", __name__).pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

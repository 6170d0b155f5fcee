"""Masked-autoencoder pretraining whose inputs start small and low-frequency and grow, on the engine of vanilla MAE."""

import os

# Before torch is loaded: idle OpenMP threads must sleep, not spin. Spinning ones starve loader processes and anything
# else on the machine: beside other busy processes on 2 cores the demo fell from about 250 to under 20 images/s. Alone
# on the machine, sleeping costs it about 5 %; set OMP_WAIT_POLICY yourself to choose otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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

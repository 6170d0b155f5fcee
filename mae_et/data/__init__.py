"""Images: which there are (`sources`), and how their bytes become the crop a stage asks for (`decode`)."""

from ..plan.shapes import OPERATORS
from .decode import CorruptImage, center_crop, to_image, train_crop, train_crops
from .sources import Source, open_source, subset

__all__ = [
    "OPERATORS",
    "CorruptImage",
    "Source",
    "center_crop",
    "open_source",
    "subset",
    "to_image",
    "train_crop",
    "train_crops",
]

"""Images: which there are (`sources`), and how their bytes become the crop a stage asks for (`decode`)."""

from .decode import OPERATORS, DamagedImage, center_crop, to_image, train_crop, train_crops
from .sources import Source, open_source, subset

__all__ = [
    "OPERATORS",
    "DamagedImage",
    "Source",
    "center_crop",
    "open_source",
    "subset",
    "to_image",
    "train_crop",
    "train_crops",
]

"""Images: which there are (`sources`), and how their bytes become the crop a stage asks for (`decode`)."""

import importlib

#: Public name -> the module that has it. Loaded when first asked for: counting images needs no torch.
_HOMES = {
    "OPERATORS": "..plan.shapes",
    "CorruptImage": ".pixels",
    "Source": ".sources",
    "center_crop": ".decode",
    "open_source": ".sources",
    "subset": ".sources",
    "to_image": ".pixels",
    "train_crop": ".decode",
    "train_crops": ".decode",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

"""Fixtures that several test modules share. The longest tests come first: begun last, one would keep a core waiting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import settings
from PIL import Image

# A machine that is busy with other work is no fault of the code.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")

# What takes seconds to import is imported in the fixtures: the process that shares the tests out needs none of it.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As `whole` and the scripts of these tests run: only then are results the same bit for bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 small smooth images, flat and unlabelled."""
    from tiny import write_photos

    return write_photos(tmp_path_factory.mktemp("images"), 20)


@pytest.fixture(scope="session")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, on one thread as the scripts of these tests run."""
    import torch
    from tiny import tiny

    from mae_et.engine.pretrain import pretrain

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = pretrain(tiny(photos, tmp_path_factory.mktemp("whole") / "run"))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in colour: 8 training and 4 held-out pictures of each."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (20, 28, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def run(tmp_path: Path, pictures: Path) -> Path:
    """What pretraining leaves behind."""
    import torch
    from tiny import SHAPE

    from mae_et.engine import storage
    from mae_et.engine.resume import FORMAT
    from mae_et.model import MaskedAutoencoder

    torch.manual_seed(0)
    folder = tmp_path / "run"
    folder.mkdir()
    facts = {"target": "pixel", "norm_pix_loss": False, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    facts |= {"format": FORMAT, "config": {"data_path": str(pictures)}}
    shape = SHAPE | {"target_dim": 192}
    storage.save(facts | {"model": MaskedAutoencoder(**shape).state_dict(), "shape": shape}, folder / "checkpoint.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(facts["config"]))
    return folder

"""Files from strangers: nothing in them runs, nothing is written where it should not be, and bombs are not decoded.

Checkpoints have their own tests in test_checkpoint and test_storage. What is promised stands in docs/security.md.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import Malicious

from mae_et.data.pixels import MAX_PIXELS, CorruptImage, to_image
from mae_et.data.sources import open_source
from mae_et.evaluate.config import FinetuneConfig
from mae_et.plan.config import PretrainConfig
from mae_et.plan.flags import from_recipe


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("config_type", [PretrainConfig, FinetuneConfig])
@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir [{marker}]", "!!python/object/new:os.mkdir [{marker}]", "!!python/name:os.x"],
)
def test_a_recipe_runs_nothing(tmp_path, tag, config_type):
    marker = tmp_path / "ran"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tag.format(marker=marker)}\n")
    with pytest.raises(ValueError, match="not a YAML file") as error:
        from_recipe(config_type, str(recipe))
    assert not marker.exists() and "\n" not in str(error.value)


def test_an_array_runs_nothing(tmp_path):
    marker, buffer = tmp_path / "ran", io.BytesIO()
    np.save(buffer, np.array([Malicious(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="npy"):
        to_image(buffer.getvalue(), 3)
    assert not marker.exists()
    np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)
    assert marker.exists()  # the file was a real attack


def _tar(path: Path, members: dict[str, bytes], links: dict[str, tuple[bytes, str]] | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, (kind, target) in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)


def test_members_of_a_tar_stay_inside_it(tmp_path):
    """Members are read, never unpacked; links, which could point at any file of the machine, are no members."""
    outside = tmp_path / "secret.png"
    outside.write_bytes(png((4, 4)))
    inside = tmp_path / "data"
    inside.mkdir()
    names = ("a/good.png", "../../escaped.png", str(tmp_path / "absolute.png"))
    links = {"a/soft.png": (tarfile.SYMTYPE, str(outside)), "a/hard.png": (tarfile.LNKTYPE, "../secret.png")}
    _tar(inside / "train.tar", {name: png() for name in names}, links)
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(inside / "train.tar"))
    assert len(source) == len(names)
    for index in range(len(source)):
        assert to_image(source.read(index)[0], 3).size == (8, 8), "not the file that a link points at"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_index_that_timm_keeps_beside_a_large_tar_runs_nothing(tmp_path):
    """timm reads `_<folder>_tarinfos.pickle` only for tars above 10 GB; a small one's is never opened."""
    marker = tmp_path / "ran"
    _tar(tmp_path / "train.tar", {"a/good.png": png()})
    for stem in (tmp_path.name, "train"):
        (tmp_path / f"_{stem}_tarinfos.pickle").write_bytes(pickle.dumps(Malicious(marker)))
    assert len(open_source(str(tmp_path / "train.tar"))) == 1
    assert not marker.exists()


def _bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it is side × side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_image_bombs_are_refused_unseen(in_chans):
    began = time.process_time()
    for side in (math.isqrt(MAX_PIXELS) + 1, 60_000):
        with pytest.raises(CorruptImage, match="limit"):
            to_image(_bomb(side), in_chans)
    assert time.process_time() - began < 1
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "|u1", "fortran_order": False, "shape": (60_000, 60_000, in_chans)}
    )
    with pytest.raises(CorruptImage):
        to_image(array.getvalue(), in_chans)

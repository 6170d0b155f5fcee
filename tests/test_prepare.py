"""Shards: what `prepare` packs is what --data_path reads; stopping it costs nothing; and the in-memory cache."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import pickle
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Child

from mae_et.cli import main
from mae_et.data.config import PrepareConfig
from mae_et.data.loader import CorruptLog, TrainImages, train_batches
from mae_et.data.pixels import to_image
from mae_et.data.prepare import pack, prepare
from mae_et.data.shards import INDEX, ShardSource
from mae_et.data.sources import CachedSource, open_source
from mae_et.data.stream import SampleStream
from mae_et.data.workers import Loading
from mae_et.plan.curriculum import Curriculum, Stage

ROOT = Path(__file__).parents[1]


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 training images of two classes, in several formats, one of them damaged, and 4 held-out ones."""
    root = tmp_path / "images"
    for split, count in (("train", 12), ("val", 4)):
        for i in range(count):
            path = root / split / ("cat", "dog")[i % 2] / f"{i:02}.{('jpg', 'png', 'webp')[i % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(path)
    (root / "train" / "cat" / "04.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    picture(77, (40, 30)).save(root / "train" / "dog" / "small.jpg", quality=50)
    return root


def packed(folder: Path, out: Path, **flags) -> dict:
    flags = {"short_side": 32, "shard_mb": 0.003, "num_workers": 0} | flags
    return prepare(PrepareConfig(str(folder), str(out), **flags))


def test_shards_hold_the_images_in_order_smaller_and_labelled(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="mae_et"):
        total = packed(folder, tmp_path / "out")
    assert (total["images"], total["damaged"]) == (12 + 4, 1)
    assert "cat/04.png: not a readable image" in caplog.text
    assert total["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*/*.tar"))
    for split in ("train", "val"):
        before, after = open_source(folder, split), open_source(tmp_path / "out", split)
        assert isinstance(after, ShardSource)
        kept = [i for i in range(len(before)) if "04.png" not in before.name(i)] if split == "train" else range(4)
        assert after.classes == before.classes == ["cat", "dog"]
        assert np.array_equal(after.labels, before.labels[list(kept)])
        for place, index in enumerate(kept):
            data, label = after.read(place)
            assert label == before.labels[index]
            image, original = to_image(data, 3), to_image(before.read(index)[0], 3)
            assert min(image.size) <= 32
            assert f"[{index:08}.jpg]" in after.name(place)
            difference = np.asarray(image, float) - np.asarray(original.resize(image.size), float)
            assert np.abs(difference).mean() < 8
            if "small" in before.name(index):  # already small enough: not encoded once more
                assert data == before.read(index)[0]
            else:
                assert image.size == (48, 32)
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) > 3
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:  # an ordinary WebDataset shard
        names = tar.getnames()
        assert names[:2] == ["00000000.jpg", "00000000.cls"]
        assert tar.extractfile(names[0]).read() == open_source(tmp_path / "out").read(0)[0]


def test_a_flat_folder_has_no_labels_and_no_val(tmp_path):
    for i in range(3):
        (tmp_path / "flat").mkdir(exist_ok=True)
        picture(i).save(tmp_path / "flat" / f"{i}.jpg")
    assert packed(tmp_path / "flat", tmp_path / "out")["images"] == 3
    source = open_source(tmp_path / "out")
    assert source.classes is source.labels is source.read(2)[1] is None
    with pytest.raises(FileNotFoundError, match="no held-out images"):
        open_source(tmp_path / "out", "val")


@pytest.mark.parametrize("data_path", ["{}", "wds/{}"])  # what is packed are ordinary WebDataset shards, too
def test_batches_from_shards_do_not_depend_on_the_workers(folder, tmp_path, data_path):
    packed(folder, tmp_path / "out")
    source = open_source(data_path.format(tmp_path / "out"))
    pickled = pickle.loads(pickle.dumps(source))
    plan = Curriculum((Stage(16, 4, 12, 6, 5, 1.0),), len(source))

    def batches(source, workers: int) -> list[torch.Tensor]:
        images = TrainImages(source, plan, 32, "scaled", 3, seed=3)
        return list(train_batches(images, SampleStream(plan, 3, 6), CorruptLog(len(source), 0), Loading(workers)))

    wanted = batches(source, 0)
    for found in (batches(source, 1), batches(source, 2), batches(pickled, 0), batches(CachedSource(source, 2000), 2)):
        assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))


def test_a_killed_prepare_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    root, whole, killed = tmp_path / "images", tmp_path / "whole", tmp_path / "killed"
    root.mkdir()
    for i in range(60):
        picture(i, (300, 200)).save(root / f"{i:02}.png")
    flags = {"short_side": 150, "shard_mb": 0.02}
    packed(root, whole, **flags)
    words = ["prepare", str(root), str(killed), "--num_workers", "1"]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    process = Child(main, tmp_path / "log.txt", words)
    deadline = time.monotonic() + 300
    while not (killed / "train" / "00001.tar.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in (killed / "train").glob("*.tar.json")}
    assert len(done) >= 2
    if not (killed / "train" / INDEX).exists():  # unless the machine was too quick for us
        with pytest.raises(FileNotFoundError, match="no images"):
            open_source(killed)
    packed(root, killed, **flags)
    assert {name: (killed / "train" / name).stat().st_mtime_ns for name in done} == done  # kept, not written again
    for file in sorted((whole / "train").glob("*.tar")):
        assert (killed / "train" / file.name).read_bytes() == file.read_bytes()


def test_a_shard_that_changed_is_written_again_and_other_settings_are_refused(folder, tmp_path, caplog):
    out = tmp_path / "out"
    packed(folder, out)
    shard = out / "train" / "00001.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[:700] + b"x" + good[701:])
    with caplog.at_level(logging.WARNING, logger="mae_et"):
        packed(folder, out)
    assert "00001.tar is not what was written" in caplog.text
    assert shard.read_bytes() == good
    with pytest.raises(ValueError, match="begun with --short_side 32; choose another folder"):
        packed(folder, out, short_side=16)
    picture(1).save(folder / "train" / "cat" / "new.png")
    with pytest.raises(ValueError, match="begun of other images"):
        packed(folder, out)


def test_images_labels_and_splits_that_are_others_by_now_are_refused(folder, tmp_path):
    out = tmp_path / "out"
    packed(folder, out)
    changed = folder / "train" / "dog" / "07.png"
    data = changed.read_bytes()
    picture(70).save(changed)
    with pytest.raises(ValueError, match=r"begun of other images: .*07\.png has changed; choose another folder"):
        packed(folder, out)
    changed.unlink()
    changed.symlink_to(tmp_path / "copy.png")
    (tmp_path / "copy.png").write_bytes(data)  # wherever and however old they are, these are the same images
    packed(folder, out)
    source = open_source(folder)
    source.labels = 1 - source.labels
    with pytest.raises(ValueError, match="begun of other labels"):
        pack(source, out / "train", PrepareConfig(str(folder), str(out), short_side=32, shard_mb=0.003))
    (folder / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"begun of other images: there is .*val, and SRC has no held-out ones"):
        packed(folder, out)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_folder_of_any_name_is_printed_as_it_is(folder, tmp_path, monkeypatch, encoding):
    source, out = folder.with_name("[red] :smile: …"), tmp_path / "[bold]out[/b]"
    folder.rename(source)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    main(["prepare", str(source), str(out), "--num_workers", "0"])
    stdout.flush()
    text = stdout.buffer.getvalue().decode(encoding).replace("\n", "")
    assert f"Train with --data_path {out}" in text
    assert ("[red] :smile: …" if encoding == "utf-8" else r"[red] :smile: \u2026") in text


def test_a_broken_index_is_named(folder, tmp_path):
    packed(folder, tmp_path / "out")
    path = tmp_path / "out" / "train" / INDEX
    good = json.loads(path.read_text())

    def message(change) -> str:
        index = json.loads(json.dumps(good))
        change(index, index["shards"][0])
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError) as error:  # noqa: PT011
            open_source(tmp_path / "out")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "names a shard outside" in message(lambda index, shard: shard.update(file="../../secret"))
    assert "beyond the end" in message(lambda index, shard: shard["offsets"].__setitem__(0, 10**9))
    assert "broken entries" in message(lambda index, shard: shard["offsets"].__setitem__(0, -1))
    assert "broken entries" in message(lambda index, shard: shard["keys"].pop())
    assert "should have" in message(lambda index, shard: shard.update(bytes=5))
    assert "is missing" in message(lambda index, shard: shard.update(file="9.tar"))
    assert "beyond its 2 classes" in message(lambda index, shard: shard["labels"].__setitem__(0, 7))
    assert "is no index" in message(lambda index, shard: index.update(format="other"))
    assert "is no index" in message(lambda index, shard: index.pop("classes"))
    assert "is no index" in message(lambda index, shard: index.update(classes=5))
    assert "is no index" in message(lambda index, shard: index.update(shards={"a": 1}))
    assert "broken entries" in message(lambda index, shard: index.update(shards=[7]))
    assert "broken entries" in message(lambda index, shard: shard.pop("offsets"))
    assert "broken entries" in message(lambda index, shard: shard.update(sizes=None))
    assert "broken entries" in message(lambda index, shard: shard.update(bytes="9"))
    for column in ("keys", "offsets", "sizes", "labels"):
        assert "broken entries" in message(lambda index, shard, c=column: shard[c].__setitem__(0, "x"))
        assert "broken entries" in message(lambda index, shard, c=column: shard[c].__setitem__(0, 2**70))


@pytest.mark.parametrize("text", ["", "[]", "7", '{"settings": {', '{"settings": {}}'])
def test_a_damaged_sidecar_is_named_and_its_shard_written_again(folder, tmp_path, caplog, text):
    packed(folder, tmp_path / "out")
    train = tmp_path / "out" / "train"
    before = {path.name: path.read_bytes() for path in train.iterdir()}
    (sidecar,) = train.rglob("00000.tar.json")
    whole = sidecar.read_bytes()
    sidecar.write_text(text)
    with caplog.at_level(logging.WARNING, logger="mae_et"):
        packed(folder, tmp_path / "out")
    assert f"{sidecar} is damaged" in caplog.text and sidecar.read_bytes() == whole
    assert {path.name: path.read_bytes() for path in train.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"short_side": 0}, "--short_side must be positive"),
        ({"quality": 99}, "--quality must be 1 to 95"),
        ({"in_chans": 4}, "--in_chans must be 1 or 3"),
    ],
)
def test_wrong_flags(folder, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        packed(folder, tmp_path / "out", **flags)


def test_out_must_not_be_inside_the_source(folder):
    with pytest.raises(ValueError, match="is inside SRC"):
        packed(folder, folder / "out")


def test_values_of_more_than_8_bits_are_spread_over_a_jpegs_levels(tmp_path, caplog):
    """Measured in the training images once, used for all splits, part of the settings; or as it is given."""
    for split in ("train", "val"):
        for i in range(3):
            file = tmp_path / "in" / split / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.linspace(776, 1009, 1200).astype(np.uint16).reshape(30, 40)).save(file)

    def levels(out: Path) -> tuple[int, int]:
        return to_image(open_source(out, "val").read(0)[0], 1).getextrema()

    packed(tmp_path / "in", tmp_path / "measured")
    low, high = levels(tmp_path / "measured")
    assert low < 10 and high > 245
    assert "pixels lie between 776 and 100" in caplog.text
    settings = json.loads((tmp_path / "measured" / "val" / INDEX).read_text())["settings"]
    assert settings["value_range"] == pytest.approx([776, 1009], abs=2)
    packed(tmp_path / "in", tmp_path / "measured")  # verified and kept
    packed(tmp_path / "in", tmp_path / "given", value_range=(0, 1009 * 2))
    low, high = levels(tmp_path / "given")
    assert 90 < low < 110 and 120 < high < 135
    with pytest.raises(ValueError, match="--value_range must be LOW HIGH with LOW < HIGH"):
        packed(tmp_path / "in", tmp_path / "wrong", value_range=(5, 5))
    with pytest.raises(ValueError, match=r"begun with --value_range \[0.0, 2018.0\]"):
        packed(tmp_path / "in", tmp_path / "given", value_range=(0, 100))


def test_a_folder_begun_before_there_was_a_value_range_goes_on(folder, tmp_path):
    packed(folder, tmp_path / "out")
    for sidecar in (tmp_path / "out").glob("*/*.tar.json"):
        shard = json.loads(sidecar.read_text())
        del shard["settings"]["value_range"]
        sidecar.write_text(json.dumps(shard))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.tar")}
    packed(folder, tmp_path / "out")
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_jpeg_with_a_hole_is_packed_and_named(tmp_path, caplog):
    pytest.importorskip("simplejpeg")
    buffer = io.BytesIO()
    picture(3, (300, 200)).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "hole.jpg").write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 100 :])
    (tmp_path / "in" / "whole.jpg").write_bytes(data)
    assert packed(tmp_path / "in", tmp_path / "out")["images"] == 2
    (warning,) = [r.getMessage() for r in caplog.records if "decoded all the same" in r.getMessage()]
    assert "hole.jpg: Corrupt JPEG data" in warning


def test_small_arrays_are_packed_like_other_images(tmp_path):
    """They once counted as damaged, since they are no JPEGs."""
    (tmp_path / "mixed").mkdir()
    for i in range(3):
        np.save(tmp_path / f"mixed/{i}.npy", np.asarray(picture(i, (40, 30))))
        picture(i, (40, 30)).save(tmp_path / f"mixed/{i}.png")
    total = packed(tmp_path / "mixed", tmp_path / "out", quality=95)
    assert (total["images"], total["damaged"]) == (6, 0)
    source = open_source(tmp_path / "out")
    arrays, pngs = ([to_image(source.read(2 * i + j)[0], 3) for i in range(3)] for j in (0, 1))
    assert all(np.array_equal(array, png) for array, png in zip(arrays, pngs, strict=True))


@pytest.mark.parametrize(("words", "name"), [(("images", ""), "OUT"), (("", "out"), "SRC")])
def test_an_empty_path_is_not_this_folder(tmp_path, monkeypatch, capsys, words, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["prepare", *words])
    assert f"error: {name} is empty; give a folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"none of its 1 images can be read; .*1\.jpg: not a readable image"):
        packed(tmp_path / "bad", tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- cache


class Files:
    """A source of encoded images that counts how often each is read; number 2 can't be."""

    def __init__(self) -> None:
        self.classes, self.labels, self.reads = ["only"], np.zeros(6, dtype=np.int64), []
        self.items = []
        for i in range(6):
            buffer = io.BytesIO()
            picture(i).save(buffer, "PNG")
            self.items.append(buffer.getvalue())

    def __len__(self) -> int:
        return 6

    def read(self, index: int) -> tuple[bytes, int]:
        self.reads.append(index)
        if index == 2:
            raise OSError("gone")
        return self.items[index], 0

    def name(self, index: int) -> str:
        return f"file {index}"


def test_a_cache_reads_once_and_stops_at_its_size():
    files = Files()
    size = sum(map(len, files.items[:2])) + len(files.items[3])
    cache = CachedSource(files, size + 1)
    files.reads.clear()
    assert [cache.read(i) for i in (0, 1, 3, 4, 5)] == [(files.items[i], 0) for i in (0, 1, 3, 4, 5)]
    assert files.reads == [4, 5]
    with pytest.raises(OSError, match="gone"):
        cache.read(2)
    assert (len(cache), cache.name(3), cache.classes) == (6, "file 3", ["only"])


def test_what_is_decoded_is_not_cached():
    photos = open_source("photos")
    assert np.array_equal(CachedSource(photos, 10**6).read(7)[0], photos.read(7)[0])


def test_loader_processes_leave_signals_to_the_command(folder, tmp_path, monkeypatch):
    source = type(open_source(folder))
    read = source.read

    def terminated(self, index: int):
        if index == 3 and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, index)

    monkeypatch.setattr(source, "read", terminated)
    assert packed(folder, tmp_path / "out", num_workers=1)["images"] == 12 + 4

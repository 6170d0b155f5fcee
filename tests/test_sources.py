"""Every kind of --data_path: what is found, in which order, with which labels, and what the errors say."""

from __future__ import annotations

import gzip
import io
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import types
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import FashionMNIST

from mae_et.data import photos, to_image
from mae_et.data.folders import EXTENSIONS, FolderSource
from mae_et.data.labelled import open_labelled
from mae_et.data.sources import count_images, open_held_out, open_source, subset
from mae_et.plan.config import PretrainConfig


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".npy":
        np.save(path, np.full((4, 6), value, np.uint8))
    else:
        Image.new("L", (6, 4), value).convert("RGB" if path.suffix.lower() == ".qoi" else "L").save(path)
    return path


def names(source) -> list[str]:
    return [os.path.relpath(source.name(i), source._root) for i in range(len(source))]


def one_line(error) -> str:
    message = str(error.value)
    assert "--data_path" in message
    assert "\n" not in message
    return message


@pytest.fixture
def labelled(tmp_path):
    for split, per_class in (("train", 3), ("val", 2)):
        for number, name in enumerate(("cat", "ant", "bee")):
            for i in range(per_class):
                write_image(tmp_path / split / name / f"{i}.png", 50 * number + i)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- photos


def test_photos_hold_every_class_equally():
    for split, per_class in (("train", 192), ("val", 24)):
        source = open_source("photos", split)
        assert len(source.classes) == len(set(source.classes)) == 17
        assert np.bincount(source.labels).tolist() == [per_class] * 17
        assert len(source) == 17 * per_class
        for index in range(0, len(source), 41):
            tile, label = source.read(index)
            assert tile.shape[:2] == (96, 96)
            assert tile.dtype == np.uint8
            assert label == source.labels[index]


def test_photos_train_and_val_never_share_a_pixel():
    train, val = (open_source("photos", split) for split in ("train", "val"))
    seen = {"train": {}, "val": {}}
    for split, source in (("train", train), ("val", val)):
        for index in range(len(source)):
            label, left, top = source.position(index)
            height, width = photos.photograph(source.classes[label]).shape[:2]
            assert 0 <= left <= width - 96
            assert 0 <= top <= height - 96
            seen[split].setdefault(label, set()).add((left, top))
    for label in range(17):
        assert len(seen["train"][label]) == 192
        assert len(seen["val"][label]) == 24
        for x, y in seen["train"][label]:
            assert not any(abs(x - left) < 96 and abs(y - top) < 96 for left, top in seen["val"][label])


def test_photos_read_what_they_name():
    source = open_source("photos", "val")
    label, left, top = source.position(100)
    assert source.name(100) == f"photos[100] ({source.classes[label]} at x={left} y={top})"
    picture = photos.photograph(source.classes[label])
    assert np.array_equal(source.read(100)[0], picture[top : top + 96, left : left + 96])
    with pytest.raises(IndexError):
        source.read(len(source))


def test_photos_come_from_the_wheels_alone(monkeypatch):
    """No download, and not even an import of the packages that could start one."""
    photos.photograph.cache_clear()
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("photos must not use the network"))
    for name in photos.CLASSES:
        assert min(photos.photograph(name).shape[:2]) >= 300
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda _: None)
    photos.photograph.cache_clear()
    with pytest.raises(FileNotFoundError) as error:
        open_source("photos").read(0)
    assert "scikit-image" in one_line(error)
    photos.photograph.cache_clear()


# ------------------------------------------------------------------------------------------------------------ folders


def test_class_folders(labelled):
    train, val = open_source(labelled), open_source(str(labelled), "val")
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    data, label = val.read(3)
    assert (np.asarray(to_image(data, 1)) == 101).all()
    assert label == 1
    assert val.name(3) == str(labelled / "val" / "bee" / "1.png")


def test_class_numbers_come_from_train(labelled):
    shutil.rmtree(labelled / "val" / "ant")
    assert open_source(labelled, "val").labels.tolist() == [1, 1, 2, 2]
    write_image(labelled / "val" / "dog" / "0.png")
    with pytest.raises(ValueError, match="dog") as error:
        open_source(labelled, "val")
    one_line(error)


def test_val_alone_can_be_opened(labelled):
    shutil.rmtree(labelled / "train")
    assert open_source(labelled, "val").classes == ["ant", "bee", "cat"]


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_val(labelled, name):
    (labelled / "val").rename(labelled / name)
    assert len(open_source(labelled, "val")) == 6


def test_nested_folders_inside_a_class(tmp_path):
    write_image(tmp_path / "train" / "a" / "deep" / "er" / "1.png")
    write_image(tmp_path / "train" / "a" / "2.png")
    write_image(tmp_path / "train" / "b" / "3.png")
    source = open_source(tmp_path)
    assert (source.classes, source.labels.tolist()) == (["a", "b"], [0, 0, 1])


def test_images_directly_in_train_have_no_labels(tmp_path):
    write_image(tmp_path / "train" / "1.png")
    write_image(tmp_path / "train" / "more" / "2.png")
    source = open_source(tmp_path)
    assert len(source) == 2
    assert source.classes is source.labels is None
    assert source.read(0)[1] is None


def test_any_folder_of_images(tmp_path):
    for path in (
        "b.png",
        "a/z.JPG",
        "a/k/c.Png",
        "c.txt",
        ".hidden.png",
        ".git/x.png",
        "__MACOSX/a/z.jpg",
        "a/._z.jpg",
    ):
        write_image(tmp_path / path) if not path.endswith("txt") else (tmp_path / path).write_text("no image")
    source = open_source(tmp_path)
    assert names(source) == ["a/k/c.Png", "a/z.JPG", "b.png"]
    assert source.classes is source.labels is None


def test_every_extension_is_found_and_decodes(tmp_path):
    for i, extension in enumerate(EXTENSIONS):
        write_image(tmp_path / f"{i:02}{extension.upper() if i % 2 else extension}", value=200)
    source = open_source(tmp_path)
    assert len(source) == len(EXTENSIONS)
    for index in range(len(source)):
        image = to_image(source.read(index)[0], 3)
        assert image.size == (6, 4)
        assert abs(image.getpixel((0, 0))[1] - 200) < 3


def test_names_that_are_not_unicode(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(write_image(tmp_path / "plain.png"), "rb") as file, open(path, "wb") as copy:
        copy.write(file.read())
    assert len({open_source(tmp_path).read(i)[0] for i in range(2)}) == 1  # both can be read


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_image(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "root"
    write_image(root / "a" / "2.png")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "file.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (root / "broken.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("itself", "itself.png", "a/itself.png"):
        (root / name).symlink_to(root / name)
    assert names(open_source(root)) == ["a/2.png", "b/1.png", "c/1.png", "file.png"]


def test_the_order_is_not_the_file_systems(tmp_path, monkeypatch):
    for name in ("c", "a", "b"):
        write_image(tmp_path / name / "x.png")
    expected = names(open_source(tmp_path))
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert names(open_source(tmp_path)) == expected == ["a/x.png", "b/x.png", "c/x.png"]


def test_workers_get_arrays_not_strings(tmp_path):
    source = FolderSource(tmp_path, [f"class/{i:07}.jpg" for i in range(100_000)], [0] * 100_000, ["class"])
    data = pickle.dumps(source)
    assert len(data) < 100_000 * (17 + 8) + 2000  # the bytes of the paths and int64 labels, and no objects
    assert pickle.loads(data).name(70_000) == str(tmp_path / "class" / "0070000.jpg")


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_missing_is_said_in_one_line(tmp_path, split):
    def message() -> str:
        with pytest.raises(FileNotFoundError) as error:
            open_source(tmp_path / "data", split)
        return one_line(error)

    assert "does not exist" in message()
    assert "photos" in message()
    (tmp_path / "data").mkdir()
    assert {"train": "jpg jpeg png", "val": "val/ or validation/ or test/"}[split] in message()
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)  # class folders, and nothing in them
    (tmp_path / "data" / "val" / "cat").mkdir(parents=True)
    assert "no images in" in message()
    assert str(tmp_path / "data" / split) in message()


def test_a_flat_folder_has_no_val(tmp_path):
    write_image(tmp_path / "1.png")
    with pytest.raises(FileNotFoundError) as error:
        open_source(tmp_path, "val")
    assert str(tmp_path) in one_line(error)


def test_a_file_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="is a file") as error:
        open_source(write_image(tmp_path / "1.png"))
    one_line(error)


def test_images_to_look_at_are_held_out_ones_where_there_are_any(labelled, tmp_path_factory):
    flat = tmp_path_factory.mktemp("flat")
    for i in range(4):
        write_image(flat / f"{i}.png")
    assert names(open_held_out(labelled)) == names(open_source(labelled, "val"))
    assert len(open_held_out(labelled, holdout=5)) == 5  # the run's own held-out images come before val/
    assert len(open_held_out(flat)) == 4
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_held_out(flat / "nowhere")


def test_images_are_counted_or_taken_from_the_flag(labelled):
    assert count_images(PretrainConfig(data_path=str(labelled), holdout=2, num_images=50)) == 7
    gone = str(labelled / "nowhere")
    assert count_images(PretrainConfig(data_path=gone, holdout=2, num_images=50)) == 48
    with pytest.raises(FileNotFoundError, match="does not exist"):
        count_images(PretrainConfig(data_path=gone))


def test_counting_images_loads_no_torch():
    """`plan` counts images, and begins in a fraction of the seconds that torch takes to load."""
    modules = "config datasets folders photos shards sources tars webdataset".split()
    code = (
        f"import sys, {', '.join(f'mae_et.data.{module}' for module in modules)}; "
        "mae_et.data.sources.open_source('photos'); mae_et.data.open_source; "
        "print(*{'torch', 'torchvision', 'timm', 'tifffile'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_only_two_splits(tmp_path):
    with pytest.raises(ValueError, match="train or val"):
        open_source("photos", "test")


# ----------------------------------------------------------------------------------------- splits, litter and endings


def files(root, *paths):
    for path in paths:
        write_image(root / path)
    return root


@pytest.mark.parametrize(
    ("train", "others", "val"),
    [
        ("train", ["valid", "test"], "valid"),  # ultralytics' and Roboflow's names
        ("Training", ["Testing"], "Testing"),
        ("TRAIN", ["Dev", "TEST"], "Dev"),
        ("training", ["evaluation"], "evaluation"),
        ("train", ["eval", "validation"], "validation"),
    ],
)
def test_splits_have_many_names(tmp_path, caplog, train, others, val):
    files(tmp_path, *(f"{split}/{c}/{split}.png" for split in (train, *others) for c in ("cat", "dog")))
    with caplog.at_level(logging.INFO):
        assert names(open_source(tmp_path)) == [f"{c}/{train}.png" for c in ("cat", "dog")]
        held_out = open_source(tmp_path, "val")
    assert names(held_out) == [f"{c}/{val}.png" for c in ("cat", "dog")]
    assert held_out.classes == ["cat", "dog"]
    assert f"held-out images are those of {tmp_path / val}" in caplog.text


def test_a_class_called_train_is_not_taken_for_the_split(tmp_path):
    files(tmp_path, "car/1.png", "plane/2.png", "train/3.png")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=r"train/ is the training images, or a class like car/ .*1 more") as error:
            open_source(tmp_path, split)
        assert str(tmp_path / "train") in one_line(error)
    assert len(open_source(tmp_path / "train")) == 1  # the first way out, and the second
    (tmp_path / "all" / "train").mkdir(parents=True)
    for name in ("car", "plane", "train"):
        (tmp_path / name).rename(tmp_path / "all" / "train" / name)
    assert open_source(tmp_path / "all").classes == ["car", "plane", "train"]


def test_folders_beside_the_splits_are_named(tmp_path, caplog):
    files(tmp_path, "train/cat/1.png", "train/dog/2.png", "extra/3.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "1.xml").write_text("<xml>")
    assert open_source(tmp_path).classes == ["cat", "dog"]  # class folders: no doubt which the split is
    assert "training images are those of train/; not extra/" in caplog.text and "annotations" not in caplog.text
    files(tmp_path, "val/cat/4.png")
    assert len(open_source(tmp_path)) == 2


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train2017/1.png", "val2017/2.png"], "train2017/ and val2017/ look like splits"),
        (["images_train/1.png", "images_val/2.png", "x/3.png"], "images_train/ and images_val/ look like splits"),
        (["train-set/1.png", "Test/2.png"], "train-set/ and Test/ look like splits"),
        (["test/1.png", "train_station/2.png"], "test/ looks like held-out images, and there is no train/"),
        (["Valid/a/1.png"], "Valid/ looks like held-out images, and there is no train/"),
        (["Train/1.png", "training/2.png"], "Train/ and training/ both look like training images"),
    ],
)
def test_what_looks_like_splits_and_is_not_understood_is_refused(tmp_path, paths, message):
    with pytest.raises(ValueError, match=message) as error:
        open_source(files(tmp_path, *paths))
    one_line(error)


def test_a_held_out_folder_that_is_not_understood_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\(val2017 isn't one of these names\)"):
        open_source(files(tmp_path, "train/1.png", "val2017/2.png"), "val")


def test_splits_inside_of_folders_are_warned_of(tmp_path, caplog):
    assert len(open_source(files(tmp_path, "images/train/1.png", "images/val/2.png", "train_station/3.png"))) == 3
    assert "images of train/ and of val/" in caplog.text.replace("val/ and of train/", "train/ and of val/")


@pytest.mark.parametrize("name", ["photos", "torch/cifar10", "hfds/mine", "wds/mine", "tfds/mine"])
def test_a_folder_called_as_a_data_set_is_refused_with_both_ways_out(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    files(tmp_path, f"{name}/1.png")
    with pytest.raises(ValueError, match=r"is the name of a data set, and there is a path") as error:
        open_source(name)
    assert f"./{name} for that" in one_line(error)
    assert len(open_source(f"./{name}")) == 1
    if name == "photos":
        assert "or photos: for the data set" in one_line(error)
        assert len(open_source("photos:")) == 3264
        assert len(open_source(str(files(tmp_path, "photos/july/2.png") / "photos"))) == 2
        assert len(open_source("photos/july")) == 1  # this is no name of a data set
    if name.startswith("wds/"):
        assert f"wds/{tmp_path / 'mine'}" in one_line(error)
    with pytest.raises(ValueError, match="choose torch/"):  # with a colon it is never the folder
        open_source("torch/nothing:")


LITTER = (
    *("@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/2.jpg", "#snapshot/3.jpg", "$RECYCLE.BIN/S-1/4.jpg"),
    *("System Volume Information/5.jpg", "lost+found/6.jpg", ".ipynb_checkpoints/7.png", "._8.jpg", ".Trashes/9.jpg"),
    *("__MACOSX/10.jpg", "@Recycle/11.jpg", "cat/@eaDir/12.jpg/x.jpg", ".AppleDouble/13.jpg", "@__thumb/14.jpg"),
)


def test_what_systems_and_network_storage_leave_behind_is_no_image_and_no_class(tmp_path, caplog):
    files(tmp_path / "train", "cat/1.png", "dog/2.png", *LITTER)
    (tmp_path / "train" / "cat" / "Thumbs.db").write_bytes(b"thumbs")
    files(tmp_path, "@eaDir/train/3.jpg")
    source = open_source(tmp_path)
    assert (source.classes, names(source)) == (["cat", "dog"], ["cat/1.png", "dog/2.png"])
    assert not caplog.records
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "train", arcname="./")
    source = open_source(tmp_path / "all.tar")
    assert (source.classes, len(source)) == (["cat", "dog"], 2)


def test_all_that_pillow_reads_is_taken_and_the_others_are_counted(tmp_path, caplog):
    endings = "jpg jpeg jpe JFIF avif jp2 j2k tga tif png webp bmp".split()
    for i, ending in enumerate(endings):
        write_image(tmp_path / f"{i}.{ending}")
    for name in ("a.heic", "b.HEIC", "c.dng", "labels.json", "README", "notes.txt"):
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "linked.jpg").symlink_to("0.jpg")
    for i in range(3):
        (tmp_path / f"gone{i}.jpg").symlink_to(f"elsewhere/{i}.jpg")
    assert len(open_source(tmp_path)) == len(endings) + 1
    assert "left out 3 broken links, 2 .heic, 1 .dng, which" in caplog.text
    (tmp_path / "phone").mkdir()
    (tmp_path / "a.heic").rename(tmp_path / "phone" / "a.heic")
    with pytest.raises(FileNotFoundError, match=r"no images in .*, not for 1 \.heic"):
        open_source(tmp_path / "phone")


def test_a_stray_picture_beside_class_folders_is_named(tmp_path, caplog):
    files(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/preview.png", "train/zebra.png")
    source = open_source(tmp_path)
    assert (len(source), source.labels) == (4, None)
    assert "preview.png lies in" in caplog.text and "(and 1 more)" in caplog.text
    for holdout in (0, 1):  # through a subset, too
        with pytest.raises(ValueError, match=r"sub-folder per class.*; preview\.png lies in .*train itself") as error:
            open_labelled(str(tmp_path), "train", None, seed=0, holdout=holdout)
        one_line(error)


# ---------------------------------------------------------------------------------------------------------- IDX files

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 8, 7)).astype(np.uint8)
LABELS = (np.arange(23) % 10).astype(np.uint8)


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(root, stem="{}-images-idx3-ubyte", gz=True, labels=LABELS):
    root.mkdir(exist_ok=True)
    pack, end = (gzip.compress, ".gz") if gz else (bytes, "")
    for split, images in (("train", IMAGES), ("t10k", IMAGES[::-1])):
        name = stem.format(split)
        (root / (name + end)).write_bytes(pack(idx(images)))
        if labels is not None:
            name = name.replace("images", "labels").replace("idx3", "idx1")
            (root / (name + end)).write_bytes(pack(idx(labels)))
    return root


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("stem", ["{}-images-idx3-ubyte", "{}-images.idx3-ubyte", "emnist-digits-{}-images-idx3-ubyte"])
def test_idx_folders(tmp_path, stem, gz):
    root = write_idx(tmp_path / "mnist", stem, gz)
    for split, images in (("train", IMAGES), ("val", IMAGES[::-1])):
        source = open_source(root, split)
        assert source.classes == list("0123456789")
        assert np.array_equal(source.labels, LABELS)
        image, label = source.read(12)
        assert np.array_equal(image, images[12])
        assert label == 2
        assert source.name(12).endswith("[12]")
        assert stem.format("")[-12:] in source.name(12)
        assert len(pickle.dumps(source)) < 500
        assert np.array_equal(pickle.loads(pickle.dumps(source)).read(12)[0], image)


def test_idx_test_names_and_more_classes(tmp_path):
    write_idx(tmp_path, "emnist-letters-{}-images-idx3-ubyte", labels=LABELS + 4)
    for path in tmp_path.glob("*t10k*"):
        path.rename(tmp_path / path.name.replace("t10k", "test"))
    assert open_source(tmp_path, "val").classes == [str(i) for i in range(14)]


def test_idx_without_labels(tmp_path):
    source = open_source(write_idx(tmp_path, labels=None))
    assert source.classes is source.labels is None
    assert source.read(0)[1] is None


def test_idx_unpacked_file_wins_over_its_archive(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[::-1]))
    assert np.array_equal(open_source(tmp_path).read(0)[0], IMAGES[-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx(IMAGES), mtime=0)[:300], "gzip"),
        (b"not gzip at all", "gzip"),
        (gzip.compress(idx(IMAGES)[:-1], mtime=0), "follow"),
        (gzip.compress(idx(IMAGES) + b"x", mtime=0), "follow"),
        (gzip.compress(idx(IMAGES[:0]), mtime=0), "announces"),
        (gzip.compress(idx(IMAGES.reshape(23, -1)), mtime=0), "3 dimensions"),
        (gzip.compress(b"\0\0\x0d\x03" + idx(IMAGES)[4:], mtime=0), "unsigned bytes"),
        (gzip.compress(b"\0\0\x08\x03", mtime=0), "no IDX file"),
        (gzip.compress(b"", mtime=0), "no IDX file"),
        (gzip.compress(idx(IMAGES[:22]), mtime=0), "23 labels, not 22"),
    ],
)
def test_idx_damage(tmp_path, content, message):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_source(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_idx_missing_or_ambiguous_split(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte.*found none") as error:
        open_source(tmp_path, "val")
    one_line(error)
    write_idx(tmp_path, "emnist-mnist-{}-images-idx3-ubyte")
    with pytest.raises(FileNotFoundError, match="several") as error:
        open_source(tmp_path)
    one_line(error)


# ------------------------------------------------------------------------------------------------------- through timm


def test_torch_data_sets(tmp_path, monkeypatch):
    write_idx(tmp_path / "FashionMNIST", gz=False)
    (tmp_path / "FashionMNIST").rename(tmp_path / "raw")
    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "raw").rename(tmp_path / "FashionMNIST" / "raw")
    monkeypatch.setenv("MAE_ET_DATA", str(tmp_path))
    for data_path in (f"torch/fashion_mnist:{tmp_path}", "torch/fashion_mnist"):
        for split, images in (("train", IMAGES), ("val", IMAGES[::-1])):
            source = open_source(data_path, split)
            assert source.classes == FashionMNIST.classes
            assert np.array_equal(source.labels, LABELS)
            image, label = source.read(12)
            assert np.array_equal(np.asarray(image), images[12])
            assert label == 2
            assert source.name(12) == f"{data_path}[12]"
            assert len(pickle.dumps(source)) < 500
            assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(source)).read(12)[0]), images[12])


def test_torch_failures_are_one_line(tmp_path, monkeypatch):
    def no_network(self):
        raise RuntimeError("Error downloading x.gz:\nTried https://nowhere, got:\n<urlopen error>")

    monkeypatch.setattr(FashionMNIST, "download", no_network)
    for data_path, expected in (
        (f"torch/fashion_mnist:{tmp_path}", "MAE_ET_DATA"),
        (f"torch/places365:{tmp_path}", str(tmp_path)),
        (f"torch/imagenet:{tmp_path}", str(tmp_path)),
        ("torch/fashion", "fashion_mnist, kmnist"),
    ):
        with pytest.raises((FileNotFoundError, ValueError)) as error:
            open_source(data_path)
        assert expected in one_line(error)
        assert data_path in one_line(error)


@pytest.mark.parametrize("data_path", ["tfds/cifar10", "hfids/x/y", "TFDS/x"])
def test_streams_are_refused(data_path):
    with pytest.raises(ValueError, match="random access") as error:
        open_source(data_path)
    assert "hfds/" in one_line(error)


def test_hugging_face_needs_its_package(monkeypatch):
    def missing(*_, **__):
        raise ImportError("No module named datasets")

    monkeypatch.setattr("timm.data.create_dataset", missing)
    with pytest.raises(ValueError, match="pip install datasets") as error:
        open_source("hfds/mnist")
    one_line(error)


def test_hugging_face_splits_and_columns(monkeypatch):
    class Reader(list):
        def filename(self, index):
            return f"{index}.png"

    class Dataset(list):
        pass

    def create(name, root, split):
        asked.append((name, root, split))
        dataset = Dataset(range(len(rows)))
        dataset.reader = Reader(rows)
        return dataset

    asked, rows = [], [(io.BytesIO(b"probe"), 0), (io.BytesIO(b"bytes"), 1)]
    monkeypatch.setattr("timm.data.create_dataset", create)
    monkeypatch.setattr(Reader, "targets", [0, 1], raising=False)
    monkeypatch.setattr(Reader, "class_to_idx", {"b": 1, "a": 0}, raising=False)
    source = open_source("hfds/me/Pets:/cache", "val")
    assert asked == [("hfds/me/Pets", "/cache", "validation")]
    assert (source.classes, source.labels.tolist()) == (["a", "b"], [0, 1])
    assert source.read(1) == (b"bytes", 1)
    assert source.name(1) == "hfds/me/Pets:/cache[1.png]"

    def no_label(self, index):
        raise KeyError("label")

    monkeypatch.setattr(Reader, "__getitem__", no_label)
    with pytest.raises(ValueError, match="'label'") as error:
        open_source("hfds/me/Pets")
    one_line(error)


class Image_:  # a feature of the package datasets, known by the name of its type
    pass


class ClassLabel:
    pass


Image_.__name__ = "Image"


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: {split: number of images} and columns; the reader insists on those it is told."""

    def upload(splits: dict[str, int], features: dict[str, object], labels=(0, 1, 0, 1)) -> None:
        class Reader:
            def __init__(self, split, image_key, label_key):
                if split not in splits:
                    raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
                if not isinstance(features.get(image_key), Image_):
                    raise TypeError("argument of type 'NoneType' is not iterable")  # what the package says
                self.label_key, self.size = label_key, splits[split]
                is_label = isinstance(features.get(label_key), ClassLabel)
                self.class_to_idx = {"a": 0, "b": 1} if is_label else {}

            def __getitem__(self, index):
                if self.label_key not in features:
                    raise KeyError(self.label_key)
                return io.BytesIO(b"image %d" % index), labels[index] if self.class_to_idx else {"bytes": b""}

            def __len__(self):
                return self.size

            def filename(self, index):
                return None

        def create(name, root, split, input_key="image", target_key="label"):
            reader = Reader(split, input_key, target_key)
            return type("Dataset", (list,), {"reader": reader})(range(len(reader)))

        package = types.SimpleNamespace(
            get_dataset_split_names=lambda name: list(splits),
            load_dataset=lambda name, split, cache_dir: types.SimpleNamespace(features=features),
        )
        monkeypatch.setitem(sys.modules, "datasets", package)
        monkeypatch.setattr("timm.data.create_dataset", create)

    return upload


@pytest.mark.parametrize(
    ("features", "classes"),
    [
        ({"img": Image_(), "label": ClassLabel()}, ["a", "b"]),  # cifar10
        ({"img": Image_(), "fine_label": ClassLabel(), "coarse_label": ClassLabel()}, ["a", "b"]),  # cifar100
        ({"path": "text", "image": Image_(), "labels": ClassLabel()}, ["a", "b"]),  # beans
        ({"scan": Image_(), "id": "number"}, None),
        ({"image": Image_()}, None),
    ],
)
def test_hugging_face_columns_and_splits_of_other_names(hub, features, classes):
    hub({"train": 4, "test": 3}, features)
    train, val = open_source("hfds/x"), open_source("hfds/x", "val")
    assert (len(train), len(val)) == (4, 3)
    assert train.classes == val.classes == classes
    assert train.read(1) == (b"image 1", 1 if classes else None)
    assert (train.labels is None) == (classes is None)


def test_hugging_face_prefers_validation_to_test_and_names_what_is_missing(hub):
    hub({"training": 4, "test": 3, "dev": 2}, {"image": Image_(), "label": ClassLabel()})
    assert (len(open_source("hfds/x")), len(open_source("hfds/x", "val"))) == (4, 2)
    hub({"train": 4}, {"image": Image_(), "label": ClassLabel()})
    with pytest.raises(FileNotFoundError, match=r"\(val\): its splits are train") as error:
        open_source("hfds/x", "val")
    one_line(error)
    hub({"train": 4}, {"text": "text", "label": ClassLabel()})
    with pytest.raises(ValueError, match="none of its columns text, label holds images") as error:
        open_source("hfds/x")
    one_line(error)
    hub({"train": 4, "test": 2}, {"image": Image_(), "label": ClassLabel()}, labels=(-1, -1, -1, -1))
    assert open_source("hfds/x", "val").labels is None  # test labels that are kept back


# ---------------------------------------------------------------------------------------------------------- FILE.tar


def pack(file, *folders):
    with tarfile.open(file, "w") as tar:
        for folder in folders:
            tar.add(folder, arcname=".")
    return file


@pytest.mark.parametrize(
    ("train", "val"), [("train.tar", "val.tar"), ("Train.TAR", "Test.TAR"), ("pets-training.tar", "pets-valid.tar")]
)
def test_tar_files(labelled, tmp_path_factory, train, val):
    root = tmp_path_factory.mktemp("tars")
    for split, name in (("train", train), ("val", val)):
        pack(root / name, labelled / split)
    pack(root / "train_station.tar", labelled / "val")
    for split, length in (("train", 9), ("val", 6)):
        source, folder = open_source(root / train, split), open_source(labelled, split)
        assert len(source) == length
        assert source.classes == ["ant", "bee", "cat"]
        assert np.array_equal(source.labels, folder.labels)
        assert [source.read(i) for i in range(length)] == [folder.read(i) for i in range(length)]
        assert "bee/0.png" in source.name(length // 3)
        assert pickle.loads(pickle.dumps(source)).read(2) == source.read(2)  # after a read, too
    (root / val).unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.tar") as error:
        open_source(root / train, "val")
    one_line(error)


def test_tars_have_the_order_and_the_classes_that_timm_gave_them(tmp_path):
    """Runs begun with timm's reader go on: natural order of paths and classes, the innermost folder is the class."""
    for i, name in enumerate(("b10", "b9", "A", "deep/c")):
        files(tmp_path / "in", f"{name}/{i}.png", f"{name}/x10.png", f"{name}/x9.jpeg")
    theirs = create_dataset("", root=str(pack(tmp_path / "all.tar", tmp_path / "in")), cache_tarfiles=False).reader
    ours = open_source(tmp_path / "all.tar")
    assert ours.classes == sorted(theirs.class_name_to_idx, key=theirs.class_name_to_idx.get) == ["A", "b9", "b10", "c"]
    assert ours.labels.tolist() == theirs.targets.tolist()
    for index in range(len(theirs)):
        assert ours.name(index) == f"{tmp_path / 'all.tar'}[{theirs.filename(index)}]"
        with theirs[index][0] as file:
            assert ours.read(index)[0] == file.read()


def test_a_tar_of_tars_has_a_class_for_each(tmp_path):
    for name in ("n01", "n02"):
        files(tmp_path / name, "1.jpg", "2.webp")
        (tmp_path / "in").mkdir(exist_ok=True)
        pack(tmp_path / "in" / f"{name}.tar", tmp_path / name)
    source = open_source(pack(tmp_path / "imagenet.tar", tmp_path / "in"))
    assert (source.classes, source.labels.tolist()) == (["n01", "n02"], [0, 1, 0, 1])
    assert source.read(2)[0] == (tmp_path / "n01" / "2.webp").read_bytes()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: data[:2000], "no complete tar"),
        (lambda data: data[:512], "no complete tar"),
        (lambda data: b"", "no complete tar (it is empty)"),
        (lambda data: b"garbage" * 300, "no complete tar"),
        (lambda data: gzip.compress(data, mtime=0), "compressed"),
        (lambda data: break_header(data, 3), "no complete tar (no end mark"),
    ],
)
def test_a_damaged_tar_in_a_tar_is_named(tmp_path, damage, what):
    (tmp_path / "in").mkdir()
    for name in ("cat", "dog"):
        files(tmp_path / name, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
        pack(tmp_path / "in" / f"{name}.tar", tmp_path / name)
    path = tmp_path / "in" / "dog.tar"
    path.write_bytes(damage(path.read_bytes()))
    outer = pack(tmp_path / "all.tar", tmp_path / "in")
    with pytest.raises(ValueError, match="is") as error:
        open_source(outer)
    assert one_line(error).startswith(f"--data_path: {outer}[./dog.tar] is {what}")


def break_header(data: bytes, number: int) -> bytes:
    """A tar with a bit of one header changed."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = tar.getmembers()[number].offset
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def test_folders_of_a_tar_may_be_called_by_any_digits(tmp_path):
    files(tmp_path / "in", "10²/1.jpg", "9/1.jpg", "10/1.jpg")
    assert open_source(pack(tmp_path / "all.tar", tmp_path / "in")).classes == ["9", "10", "10²"]


def test_classes_of_a_held_out_tar_are_those_of_train(labelled):
    shutil.rmtree(labelled / "val" / "ant")
    pack(labelled / "train.tar", labelled / "train"), pack(labelled / "val.tar", labelled / "val")
    val = open_source(labelled / "train.tar", "val")
    assert (val.classes, val.labels.tolist()) == (["ant", "bee", "cat"], [1, 1, 2, 2])
    files(labelled / "val", "dog/1.png")
    pack(labelled / "val.tar", labelled / "val")
    with pytest.raises(ValueError, match=r"class folders dog of .*val\.tar are not in .*train\.tar") as error:
        open_source(labelled / "train.tar", "val")
    one_line(error)


def test_images_in_no_folder_of_a_tar_have_no_labels(tmp_path, caplog):
    files(tmp_path / "in", "1.png", "2.png")
    assert open_source(pack(tmp_path / "flat.tar", tmp_path / "in")).labels is None
    assert not caplog.records
    files(tmp_path / "in", "cat/3.png")
    assert open_source(pack(tmp_path / "mixed.tar", tmp_path / "in")).classes is None
    with pytest.raises(ValueError, match=r"1\.png of .*mixed\.tar lies in no folder"):
        open_labelled(str(tmp_path / "mixed.tar"), "train", None, seed=0)


def test_a_tar_with_splits_inside_is_warned_of(labelled, caplog):
    assert len(open_source(pack(labelled / "all.tar", labelled))) == 15
    assert "are taken" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(bytes(2048), mtime=0), "is compressed"),
        (b"", "is no complete tar (it is empty)"),
        (b"\n<!DOCTYPE html><html>404</html>", "is no complete tar (it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(600), "it is a zip file"),
        (b"something else" * 100, "is no complete tar"),
        (bytes(1024), "no images in it"),
    ],
)
def test_what_is_no_tar_is_said_in_one_line(tmp_path, content, message):
    (tmp_path / "train.tar").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        open_source(tmp_path / "train.tar")
    assert message in one_line(error) and str(tmp_path / "train.tar") in one_line(error)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed on Linux only")
def test_tar_files_are_not_left_open(labelled, tmp_path):
    """Workers forked after a read would share one file offset and read each other's bytes."""
    source = open_source(pack(tmp_path / "train.tar", labelled / "train"))
    source.read(0)
    open_files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not any(path.endswith("train.tar") for path in open_files)


# ------------------------------------------------------------------------------------------------------------- subset


class Numbers:
    """A source whose image i is the number i."""

    def __init__(self, labels):
        self.labels = None if labels is None else np.array(labels)
        self.classes = None if labels is None else [str(c) for c in range(max(labels) + 1)]
        self.size = 40 if labels is None else len(labels)

    def __len__(self):
        return self.size

    def read(self, index):
        return index, None if self.labels is None else int(self.labels[index])

    def name(self, index):
        return f"numbers[{index}]"


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.data(), st.integers(0, 9))
def test_subsets_are_balanced_nested_and_reproducible(labels, data, seed):
    source = Numbers(labels)
    size = data.draw(st.integers(1, len(labels)))
    part = subset(source, size, seed)
    images = [part.read(i)[0] for i in range(len(part))]
    assert len(part) == size == len(set(images))
    assert images == sorted(images)
    assert [part.name(i) for i in range(size)] == [f"numbers[{i}]" for i in images]
    assert part.labels.tolist() == [part.read(i)[1] for i in range(size)] == [labels[i] for i in images]
    assert part.classes == source.classes
    # a class gives fewer than another gives + 1 only when it has no more to give
    given_, owned = (np.bincount(x, minlength=6) for x in (part.labels, source.labels))
    for c in range(6):
        assert given_[c] == owned[c] or given_[c] >= given_.max() - 1
    assert images == [subset(source, size, seed).read(i)[0] for i in range(size)]
    larger = subset(source, data.draw(st.integers(size, len(labels))), seed)
    assert set(images) <= {larger.read(i)[0] for i in range(len(larger))}


@settings(max_examples=60)
@given(st.lists(st.sampled_from([-1, 0, 1, 2, 2, 2, 2, 5]), min_size=1, max_size=80), st.data(), st.integers(0, 9))
def test_proportional_subsets_give_every_class_its_share(labels, data, seed):
    source = Numbers(labels)
    size = data.draw(st.integers(1, len(labels)))
    part, larger = (subset(source, n, seed, proportional=True) for n in (size, min(size + 1, len(labels))))
    assert len(part) == size == len(np.unique(part.indices)) and set(part.indices) <= set(larger.indices)
    # Webster's apportionment: nobody's last seat is dearer than anybody's next one
    seats, classes = Counter(part.labels.tolist()), Counter(labels)
    last = max((seats[c] - 0.5) / classes[c] for c in classes)
    following = min((seats[c] + 0.5) / classes[c] for c in classes)
    assert last <= following
    if len(set(classes.values())) == 1:
        assert np.array_equal(part.indices, subset(source, size, seed).indices)


def test_what_is_held_out_has_the_shares_of_the_classes(tmp_path):
    """Equally many of each class would take a rare one out of training, and judge by a mixture that is nowhere else."""
    for name, images in (("rare", 3), ("common", 57)):
        for i in range(images):
            write_image(tmp_path / "train" / name / f"{i}.png")
    held_out, others = (open_source(tmp_path, split, holdout=20) for split in ("val", "train"))
    assert [Counter(s.labels.tolist()) for s in (held_out, others)] == [{0: 19, 1: 1}, {0: 38, 1: 2}]
    part = open_labelled(str(tmp_path), "val", 20, seed=0, holdout=40)  # --eval_images 20
    assert Counter(part.labels.tolist()) == {0: 19, 1: 1}
    part = open_labelled(str(tmp_path), "train", 20, seed=0)  # --train_images 20: as many of each
    assert Counter(part.labels.tolist()) == {0: 17, 1: 3}


def test_subsets_depend_on_the_seed_and_need_no_labels():
    parts = {tuple(p.read(i)[0] for i in range(10)) for p in (subset(Numbers(None), 10, seed) for seed in range(5))}
    assert len(parts) == 5
    assert subset(Numbers(None), 10, 0).labels is None


@pytest.mark.parametrize("num_images", [0, -1, 41])
def test_impossible_subsets(num_images):
    with pytest.raises(ValueError, match=r"1\.\.40"):
        subset(Numbers(None), num_images, 0)

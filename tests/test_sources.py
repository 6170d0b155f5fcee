"""Every kind of --data_path: what is found, in which order, with which labels, and what the errors say."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import FashionMNIST

from mae_et.data import photos, to_image
from mae_et.data.folders import EXTENSIONS, FolderSource
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
            height, width = photos._photograph(source.classes[label]).shape[:2]
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
    picture = photos._photograph(source.classes[label])
    assert np.array_equal(source.read(100)[0], picture[top : top + 96, left : left + 96])
    with pytest.raises(IndexError):
        source.read(len(source))


def test_photos_come_from_the_wheels_alone(monkeypatch):
    """No download, and not even an import of the packages that could start one."""
    photos._photograph.cache_clear()
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("photos must not use the network"))
    for name in photos.CLASSES:
        assert min(photos._photograph(name).shape[:2]) >= 300
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda _: None)
    photos._photograph.cache_clear()
    with pytest.raises(FileNotFoundError) as error:
        open_source("photos").read(0)
    assert "scikit-image" in one_line(error)
    photos._photograph.cache_clear()


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
    modules = "config datasets folders photos shards sources webdataset".split()
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


def test_tar_files(labelled, tmp_path_factory):
    root = tmp_path_factory.mktemp("tars")
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(labelled / split, arcname=".")
    for split, length in (("train", 9), ("val", 6)):
        source, folder = open_source(root / "train.tar", split), open_source(labelled, split)
        assert len(source) == length
        assert source.classes == ["ant", "bee", "cat"]
        assert np.array_equal(source.labels, folder.labels)
        assert [source.read(i) for i in range(length)] == [folder.read(i) for i in range(length)]
        assert "bee/0.png" in source.name(length // 3)
        assert pickle.loads(pickle.dumps(source)).read(2) == source.read(2)  # after a read, too
    (root / "val.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.tar") as error:
        open_source(root / "train.tar", "val")
    one_line(error)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed on Linux only")
def test_tar_files_are_not_left_open(labelled, tmp_path):
    """Workers forked after a read would share one file offset and read each other's bytes."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(labelled / "train", arcname=".")
    source = open_source(tmp_path / "train.tar")
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


@settings(max_examples=60, deadline=None)
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


def test_subsets_depend_on_the_seed_and_need_no_labels():
    parts = {tuple(p.read(i)[0] for i in range(10)) for p in (subset(Numbers(None), 10, seed) for seed in range(5))}
    assert len(parts) == 5
    assert subset(Numbers(None), 10, 0).labels is None


@pytest.mark.parametrize("num_images", [0, -1, 41])
def test_impossible_subsets(num_images):
    with pytest.raises(ValueError, match=r"1\.\.40"):
        subset(Numbers(None), num_images, 0)

"""WebDataset shards: any image at any time, the same ones that other readers find, and clear words on broken tars."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.data import shards, webdataset
from mae_et.data.config import PrepareConfig
from mae_et.data.prepare import prepare
from mae_et.data.sources import open_source
from mae_et.data.webdataset import INDEX, expand

Members = list[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def users_cache(tmp_path_factory, monkeypatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


MOMENTS = itertools.count(1_700_000_000_000_000_000, 1_000_000_000)


def write_tar(file: Path, members: Members, format: int = tarfile.GNU_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    moment = next(MOMENTS)  # two files within a tick of the clock would have the same time
    os.utime(file, ns=(moment, moment))
    return file


def samples(first: int, count: int, classes: int = 3) -> Members:
    """key.cls, key.jpg and key.txt of so many images; the bytes of image n are its number, repeated."""
    members = []
    for n in range(first, first + count):
        label = str(n % classes).encode()
        members += [(f"{n:05}.cls", label), (f"{n:05}.jpg", b"%d," % n * (n + 1)), (f"{n:05}.txt", b"a caption")]
    return members


def contents(source) -> list[tuple[bytes, int | None]]:
    return [source.read(index) for index in range(len(source))]


def message(data_path: object, split: str = "train", kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        open_source(f"wds/{data_path}", split)
    assert "\n" not in str(error.value) and "--data_path" in str(error.value)
    return str(error.value)


def image(n: int) -> bytes:
    return b"%d," % n * (n + 1)


# ------------------------------------------------------------------------------------------------------ which shards


@pytest.fixture(params=["sub-folders", "names"])
def folder(request, tmp_path) -> Path:
    """Two training shards of 5 and 4 images, one held-out one of 2, and one of 2 for a test, which is not used."""
    where = {
        "sub-folders": "{split}/{n:06}.tar",
        "names": "Imagenet1k-{split}-{n:02}.TAR",
    }[request.param]
    for split, n, first, count in (("train", 1, 5, 4), ("train", 0, 0, 5), ("val", 0, 100, 2), ("test", 0, 200, 2)):
        write_tar(tmp_path / where.format(split=split, n=n), samples(first, count))
    (tmp_path / "notes.txt").write_text("no shard")
    (tmp_path / "._Imagenet1k-train-00.tar").write_text("what macOS leaves")
    return tmp_path


def test_splits_labels_and_random_access(folder):
    train, val = open_source(f"wds/{folder}"), open_source(f"WDS/{folder}", "val")
    assert contents(train) == [(image(n), n % 3) for n in range(9)]
    assert contents(val) == [(image(n), n % 3) for n in (100, 101)]
    assert train.classes == val.classes == ["0", "1", "2"]
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [n % 3 for n in range(9)]
    assert train.read(7) == (image(7), 1)
    assert train.name(7).lower().endswith(".tar[00007.jpg]") and str(folder) in train.name(7)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Training/0.tar", "Testing/0.tar"),
        ("train/0.tar", "valid/0.tar"),
        ("x-training-0.tar", "x-dev-0.tar"),
        ("a-0.tar", "a-EVAL-0.tar"),
    ],
)
def test_other_names_of_splits(tmp_path, caplog, train, val):
    write_tar(tmp_path / train, samples(0, 3))
    write_tar(tmp_path / val, samples(3, 2))
    if "valid" in val:
        write_tar(tmp_path / val.replace("valid", "test"), samples(5, 4))
    with caplog.at_level(logging.INFO):
        assert len(open_source(f"wds/{tmp_path}")) == 3
        assert len(open_source(f"wds/{tmp_path}", "val")) == 2
    assert "held-out images are those of" in caplog.text and val.split("/")[0] in caplog.text


def test_held_out_shards_of_a_pattern_in_any_case(tmp_path):
    write_tar(tmp_path / "Set-Train-0.tar", samples(0, 3))
    write_tar(tmp_path / "Set-Test-0.tar", samples(3, 2))
    assert len(open_source(f"wds/{tmp_path}/Set-Train-{{0..0}}.tar", "val")) == 2


def test_litter_in_shards_is_no_image(tmp_path):
    litter = [("@eaDir/a.jpg/SYNO_THUMB.jpg", b"x"), ("__MACOSX/a.jpg", b"x"), (".Trash/b.jpg", b"x")]
    write_tar(tmp_path / "0.tar", [("./a.jpg", b"a"), *litter])
    assert contents(open_source(f"wds/{tmp_path}")) == [(b"a", None)]


def test_patterns_with_braces(tmp_path):
    for split, count in (("train", 12), ("val", 2)):
        for n in range(count):
            write_tar(tmp_path / split / f"set-{split}-{n:04}.tar", samples(n, 1))
    pattern = f"wds/{tmp_path}/train/set-train-{{0000..0010}}.tar"
    assert contents(open_source(pattern)) == [(image(n), n % 3) for n in range(11)]
    with pytest.raises(ValueError, match="labels 1 of val are not in train"):
        open_source(pattern.replace("0010", "0000"), "val")
    assert contents(open_source(pattern, "val")) == [(image(0), 0), (image(1), 1)]
    some = f"{tmp_path}/train/set-train-{{0003,0001,0001}}.tar"
    assert contents(open_source(f"wds/{some}")) == [(image(1), 1), (image(3), 0)]
    wrong = str(tmp_path / "train" / "set-train-{0009..0012}.tar")
    assert "set-train-0012.tar does not exist" in message(wrong, kind=FileNotFoundError)
    (tmp_path / "train" / "set-train-0011.tar").rename(tmp_path / "other.tar")
    assert "no shards of val" in message(tmp_path / "other.tar", "val", FileNotFoundError)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", "a.tar"),
        ("{8..11}", "8 9 10 11"),
        ("{08..11}", "08 09 10 11"),
        ("x{000..001}y", "x000y x001y"),
        ("{a,b}/{0..1}.tar", "a/0.tar a/1.tar b/0.tar b/1.tar"),
        ("{a,b{1..2}}", "a b1 a b2"),  # a set in the end
    ],
)
def test_braces(pattern, names):
    assert expand(pattern) == names.split()


def test_what_is_missing_is_said_in_one_line(tmp_path):
    assert "does not exist" in message(tmp_path / "nowhere", kind=FileNotFoundError)
    assert "does not exist" in message("", kind=FileNotFoundError)
    assert "no shards of train" in message(tmp_path, kind=FileNotFoundError)
    write_tar(tmp_path / "0.tar", [("a.txt", b"no image")])
    assert "no images in 1 shards" in message(tmp_path, kind=FileNotFoundError)
    assert "no shards of val" in message(tmp_path, "val", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="wds/FOLDER"):
        open_source(tmp_path)


# ------------------------------------------------------------------------------------------------ members and labels

LONG = "d" * 90 + "/" + "e" * 120  # more than the 100 and 155 bytes that a plain header holds


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    names = [
        f"{LONG}.jpg",
        f"{LONG}2.JPEG",
        "a.b/c é.png",
        "./d.PnG",
        "/abs.webp",
        "../up.jpg",
        "caf\udce9.jpg",
        "g.npy",
    ]
    write_tar(tmp_path / "0.tar", [(name, name.encode(errors="replace")) for name in names], format)
    before = sorted(tmp_path.parent.rglob("*"))
    source = open_source(f"wds/{tmp_path}")
    assert contents(source) == [(name.encode(errors="replace"), None) for name in names]
    assert [source.name(i) for i in range(len(source))] == [f"{tmp_path / '0.tar'}[{name}]" for name in names]
    assert set(tmp_path.parent.rglob("*")) - set(before) == {tmp_path / INDEX}  # nothing was unpacked
    assert contents(open_source(f"wds/{tmp_path}")) == contents(source)  # from the index


def test_only_regular_files_count(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    with tarfile.open(write_tar(tmp_path / "0.tar", [("a.jpg", b"a")]), "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "b.jpg"), (tarfile.LNKTYPE, "c.jpg"), (tarfile.DIRTYPE, "d.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../secret.jpg"
            tar.addfile(info)
        for name in ("._e.jpg", "dir.x/.f.jpg", "noextension", "g"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert contents(open_source(f"wds/{tmp_path}")) == [(b"a", None)]


def test_one_image_per_key(tmp_path):
    members = [
        ("a.png", b"second"),
        ("a.seg.png", b"mask"),
        ("a.jpg", b"first"),
        ("b.left.png", b"only"),
        ("c.npy", b""),
    ]
    write_tar(tmp_path / "0.tar", members)
    assert contents(open_source(f"wds/{tmp_path}")) == [(b"first", None), (b"only", None), (b"", None)]
    write_tar(tmp_path / "0.tar", [("v1.5.jpg", b"one"), ("v1.6.jpg", b"other")])
    assert "v1.5.jpg and v1.6.jpg; a key ends at its first dot" in message(tmp_path)


@pytest.mark.parametrize("twice", ["a.jpg", "a.cls"])
def test_a_member_may_not_come_twice_in_a_shard(tmp_path, twice):
    write_tar(tmp_path / "0.tar", [("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"0"), (twice, b"1")])
    assert f"0.tar has {twice} twice" in message(tmp_path)


def test_keys_may_come_again_in_another_shard(tmp_path):
    for n in range(2):
        write_tar(tmp_path / f"{n}.tar", [("0.jpg", b"%d" % n), ("0.cls", b"%d" % n)])
    assert contents(open_source(f"wds/{tmp_path}")) == [(b"0", 0), (b"1", 1)]


@pytest.mark.parametrize(
    ("files", "classes", "labels"),
    [
        ([("cls", b"2"), ("cls", b" 00\n")], ["0", "1", "2"], [2, 0]),
        ([("cls", b"dog"), ("cls", b"big  cat\n")], ["big cat", "dog"], [1, 0]),
        ([("cls", b"7"), ("cls", b"cat")], ["7", "cat"], [0, 1]),
        ([("json", b'{"label": 1, "url": "x"}'), ("json", b'{"cls": 0}')], ["0", "1"], [1, 0]),
        ([("json", b'{"class": "b"}'), ("cls", b"a")], ["a", "b"], [1, 0]),
        ([("cls", b"1"), ("cls", b"-1")], None, None),
        ([("cls", b"1"), ("txt", b"0")], None, None),
        ([("cls", b"1"), ("json", b"[" * 60000)], None, None),
        ([("cls", b"1"), ("json", b'{"label": [0, 1]}')], None, None),
        ([("cls", b"1"), ("json", b'{"label": true}')], None, None),
        ([("cls", b"1"), ("cls", b"0" * (1 << 17))], None, None),
        ([("json", b'{"width": 640}'), ("json", b"3")], None, None),
    ],
)
def test_labels(tmp_path, caplog, files, classes, labels):
    write_tar(tmp_path / "0.tar", [("0.jpg", b""), *((f"{i}.{name}", data) for i, (name, data) in enumerate(files))])
    write_tar(tmp_path / "1.tar", [])
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"), io.BytesIO())
    source = open_source(f"wds/{tmp_path}")
    assert source.classes == classes
    assert (source.labels if labels is None else source.labels.tolist()) == labels
    assert [label for _, label in contents(source)] == (labels or [None, None])
    some = any(name == "cls" for name, _ in files) and labels is None
    assert ("1 of 2 images have no label" in caplog.text) == some


def test_cls_goes_before_json(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.json", b'{"label": 5}'), ("0.jpg", b""), ("0.cls", b"3")])
    assert open_source(f"wds/{tmp_path}").labels.tolist() == [3]


def test_a_huge_label_is_no_class_number(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.jpg", b""), ("0.cls", b"99999999999")])
    assert "label 99999999999" in message(tmp_path)


def test_classes_come_from_train(tmp_path):
    write_tar(tmp_path / "train" / "0.tar", [("0.jpg", b""), ("0.cls", b"ant"), ("1.jpg", b""), ("1.cls", b"bee")])
    val = write_tar(tmp_path / "val" / "0.tar", [("0.jpg", b""), ("0.cls", b"bee")])
    source = open_source(f"wds/{tmp_path}", "val")
    assert (source.classes, source.labels.tolist()) == (["ant", "bee"], [1])
    write_tar(val, [("0.jpg", b""), ("0.cls", b"cat")])
    assert "labels cat of val are not in train" in message(tmp_path, "val")
    write_tar(val, [("0.jpg", b"")])
    assert open_source(f"wds/{tmp_path}", "val").classes is None


# ------------------------------------------------------------------------------------------------------- broken tars


@pytest.mark.parametrize("keep", [1, 700, 512 * 3 + 100, -512 * 18, 0])
def test_a_tar_that_is_cut_short_is_named(tmp_path, keep):
    """In the first header, in a member, in a later header, between two members, in the very first byte."""
    file = write_tar(tmp_path / "0.tar", samples(0, 2))
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    whole = file.read_bytes()
    file.write_bytes(whole[:end] if keep < 0 else whole[:keep])
    assert "0.tar is no complete tar" in message(tmp_path)


def test_a_tar_that_is_cut_anywhere_is_named(tmp_path):
    """In a label, too, which is read while the tar is looked through."""
    file = write_tar(tmp_path / "0.tar", [("0.jpg", b"0"), ("0.json", b'{"label": 3}' * 60), ("0.cls", b"3")])
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for keep in range(0, end + 1, 61):
        file.write_bytes(whole[:keep])
        assert "0.tar is no complete tar" in message(tmp_path)


def test_a_broken_header_is_not_the_end(tmp_path):
    file = write_tar(tmp_path / "0.tar", samples(0, 4))
    with tarfile.open(file) as tar:
        offset = tar.getmembers()[6].offset
    data = bytearray(file.read_bytes())
    data[offset + 2] ^= 1
    file.write_bytes(data)
    with tarfile.open(file) as tar:
        assert len(tar.getmembers()) == 6  # what tarfile makes of it
    assert f"no end mark at byte {offset}" in message(tmp_path)


def test_a_negative_size_does_not_go_round_in_circles(tmp_path):
    file = write_tar(tmp_path / "0.tar", samples(0, 4))
    data = bytearray(file.read_bytes())
    info = tarfile.TarInfo("evil.jpg")
    info.size = -2048
    data[512 * 6 : 512 * 7] = info.tobuf(tarfile.GNU_FORMAT)
    file.write_bytes(data)
    assert "0.tar is no complete tar" in message(tmp_path)


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "0.tgz"])
def test_compressed_tars_are_refused(tmp_path, name):
    plain = write_tar(tmp_path / "plain", samples(0, 2))
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    assert f"{name} is compressed" in message(tmp_path)


def test_sparse_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"GNU.sparse.map": "0,1,4,1", "GNU.sparse.size": "5"}
        info.size = 2
        tar.addfile(info, io.BytesIO(b"ab"))
    assert "a.jpg is sparse" in message(tmp_path)


# ------------------------------------------------------------------------------------------------------------- index


@pytest.fixture
def scanned(monkeypatch) -> list[str]:
    """Names of the shards that were read through."""
    names: list[str] = []
    scan = webdataset.scan
    monkeypatch.setattr(webdataset, "scan", lambda file: names.append(file.name) or scan(file))
    return names


def test_shards_are_read_through_once_and_again_when_they_change(tmp_path, scanned):
    files = [write_tar(tmp_path / f"{n}.tar", samples(n, 1)) for n in range(3)]
    first = open_source(f"wds/{tmp_path}")
    assert sorted(scanned) == ["0.tar", "1.tar", "2.tar"]
    scanned.clear()
    again = open_source(f"wds/{tmp_path}")
    assert not scanned
    assert contents(again) == contents(first) == [(image(n), n) for n in range(3)]
    assert again.classes == first.classes
    os.utime(files[1], ns=(1, 1))
    write_tar(files[2], samples(2, 30))
    assert len(open_source(f"wds/{tmp_path}")) == 32
    assert sorted(scanned) == ["1.tar", "2.tar"]
    scanned.clear()
    files[0].unlink()
    open_source(f"wds/{tmp_path}/{{1..2}}.tar")
    assert not scanned
    os.utime(files[1], ns=(2, 2))
    open_source(f"wds/{tmp_path}")
    assert [entry["file"] for entry in json.loads((tmp_path / INDEX).read_text())["shards"]] == ["1.tar", "2.tar"]


def test_a_part_of_a_folder_does_not_forget_the_rest(tmp_path, scanned):
    for n in range(3):
        write_tar(tmp_path / f"{n}.tar", samples(n, 1))
    open_source(f"wds/{tmp_path}/{{0..1}}.tar")
    open_source(f"wds/{tmp_path}/{{1..2}}.tar")
    open_source(f"wds/{tmp_path}")
    assert sorted(scanned) == ["0.tar", "1.tar", "2.tar"]


def test_a_folder_that_cannot_be_written_is_indexed_in_the_users_cache(tmp_path, users_cache, scanned, caplog):
    write_tar(tmp_path / "0.tar", samples(0, 2))
    (tmp_path / INDEX).mkdir()  # so that no file can take its name, whoever runs this
    open_source(f"wds/{tmp_path}")
    assert len(list((users_cache / "mae_et").iterdir())) == 1
    open_source(f"wds/{tmp_path}")
    assert scanned == ["0.tar"]
    write_tar(tmp_path / "0.tar", samples(0, 3))
    assert len(open_source(f"wds/{tmp_path}")) == 3
    (tmp_path / INDEX).rmdir()  # and where both are there, it is the one that fits
    write_tar(tmp_path / "0.tar", samples(0, 4))
    for _ in range(2):
        assert len(open_source(f"wds/{tmp_path}")) == 4
    assert scanned == ["0.tar"] * 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_without_any_place_for_an_index_it_still_works(tmp_path, users_cache, caplog):
    write_tar(tmp_path / "0.tar", samples(0, 2))
    (tmp_path / INDEX).mkdir()
    users_cache.rmdir()
    users_cache.write_text("no folder")
    assert len(open_source(f"wds/{tmp_path}")) == 2
    assert "can't be kept anywhere" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, "0.tar"]


@pytest.mark.parametrize(
    "change",
    [
        lambda index: "{",
        lambda index: [],
        lambda index: index | {"format": "other"},
        lambda index: index | {"shards": [index["shards"][0] | {"offsets": [0, 1 << 40]}]},
        lambda index: index | {"shards": [index["shards"][0] | {"sizes": [-1, 1]}]},
        lambda index: index | {"shards": [index["shards"][0] | {"keys": [1, 2]}]},
        lambda index: index | {"shards": [index["shards"][0] | {"labels": ["0"]}]},
        lambda index: index | {"shards": [index["shards"][0] | {"labels": [["0"], 1]}]},
        lambda index: index | {"shards": [{"file": "../0.tar"}, {"file": 3}, {"file": "0.tar"}]},
        lambda index: index | {"shards": [{"file": []}]},
    ],
)
def test_a_broken_index_is_written_again(tmp_path, scanned, change):
    write_tar(tmp_path / "0.tar", samples(0, 2))
    wanted = contents(open_source(f"wds/{tmp_path}"))
    index = change(json.loads((tmp_path / INDEX).read_text()))
    (tmp_path / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    for _ in range(2):
        assert contents(open_source(f"wds/{tmp_path}")) == wanted
    assert scanned == ["0.tar"] * 2


# ------------------------------------------------------------------------------------------------ reading and others


def test_pickled_after_a_read_it_opens_its_own_files(tmp_path):
    write_tar(tmp_path / "0.tar", samples(0, 3))
    source = open_source(f"wds/{tmp_path}")
    wanted = contents(source)
    assert source._open
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._open
    del source
    assert contents(copy) == wanted
    assert copy.name(2).endswith("0.tar[00002.jpg]")


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 2)
    for n in range(5):
        write_tar(tmp_path / f"{n}.tar", samples(n, 1))
    source = open_source(f"wds/{tmp_path}")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for n in (0, 1, 2, 3, 4, 0, 3, 1):
        assert source.read(n)[0] == image(n)
        assert len(source._open) <= 2
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 2


def test_a_shard_that_shrank_later_is_an_error_of_that_image(tmp_path):
    file = write_tar(tmp_path / "0.tar", samples(0, 3))
    source = open_source(f"wds/{tmp_path}")
    os.truncate(file, 600)
    with pytest.raises(OSError, match=r"00002\.jpg\] ends after 0 of 6 bytes"):
        source.read(2)


def test_the_same_images_as_webdataset_finds(tmp_path):
    """The reader that gave the format its name, in its own order: shard by shard, key by key."""
    theirs = pytest.importorskip("webdataset")
    random = np.random.default_rng(0)
    for n in range(3):
        members = []
        for i in range(int(random.integers(1, 9))):
            key = f"d.{n}/{'k' * int(random.integers(1, 150))}{i}"
            kinds = [("JPG", random.bytes(int(random.integers(1, 3000)))), ("cls", str(i).encode()), ("seg.png", b"x")]
            members += [(f"{key}.{name}", data) for name, data in random.permutation(np.array(kinds, dtype=object))]
        write_tar(tmp_path / f"{n}.tar", members, [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT][n % 2])
    files = [str(tmp_path / f"{n}.tar") for n in range(3)]
    wanted = [
        (s["jpg"], int(s["cls"])) for s in theirs.WebDataset(files, shardshuffle=False, empty_check=False) if "jpg" in s
    ]
    assert len(wanted) > 3
    assert contents(open_source(f"wds/{tmp_path}")) == wanted


def test_prepare_packs_shards_again(tmp_path, caplog):
    def jpeg(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (60, 40), (value, 0, 0)).save(buffer, "JPEG")
        return buffer.getvalue()

    for split in ("train", "val"):
        members = [
            (f"{n}.{name}", data) for n in range(4) for name, data in (("jpg", jpeg(n)), ("cls", b"%d" % (n % 2)))
        ]
        write_tar(tmp_path / "in" / split / "0.tar", [*members, ("4.jpg", b"broken"), ("4.cls", b"0")])
    with caplog.at_level(logging.WARNING):
        total = prepare(PrepareConfig(f"wds/{tmp_path / 'in'}", str(tmp_path / "out"), short_side=20, num_workers=0))
    assert (total["images"], total["damaged"]) == (8, 2)
    assert "0.tar[4.jpg]" in caplog.text
    assert open_source(tmp_path / "out", "val").labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="is inside SRC"):
        PrepareConfig(f"wds/{tmp_path / 'in'}", str(tmp_path / "in"))

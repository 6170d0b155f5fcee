"""A checkpoint is never lost: not to a kill at any moment of a save, a full disk, or bytes that change on the disk."""

from __future__ import annotations

import argparse
import bz2
import contextlib
import errno
import gzip
import http.server
import io
import logging
import lzma
import os
import pickle
import re
import runpy
import subprocess
import sys
import tarfile
import threading
import uuid
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from enum import Enum
from functools import partial
from pathlib import Path, PosixPath, PurePosixPath
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy._core.multiarray import scalar as np_scalar
from PIL import Image
from tiny import ROOT, Malicious
from torchvision.transforms import InterpolationMode

from mae_et import files
from mae_et.engine.storage import HARMLESS, LeftOut, load, local_file, read, save, save_safetensors
from mae_et.files import CheckpointError, CorruptCheckpoint, kept, load_newest

#: What a save asks of the operating system, in any order; a process may die before or after each of them.
CALLS = ("fsync", "link", "replace", "unlink", "rmdir")


def numbered(number: int) -> dict:
    return {"step": number, "model": {"w": torch.full((2000,), float(number))}}


def whole(path: Path) -> int:
    """The number that all of a checkpoint agrees on."""
    content = load(path)
    assert torch.equal(content["model"]["w"], numbered(content["step"])["model"]["w"])
    return content["step"]


def test_the_newest_is_checkpoint_pt_and_as_many_stay_as_asked_for(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for number in range(1, 6):
        save(numbered(number), path, keep=3)
    assert [whole(file) for file in (path, *kept(path))] == [5, 4, 3]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "checkpoint.prev1.pt",
        "checkpoint.prev2.pt",
        "checkpoint.pt",
    ]
    save(numbered(6), path, keep=2)
    assert [whole(file) for file in (path, *kept(path))] == [6, 5]
    save(numbered(7), path)
    assert [whole(file) for file in (path, *kept(path))] == [7]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="dies in a forked process")
@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_death_at_any_moment_of_a_save_leaves_a_whole_newest_one(tmp_path, keep, links):
    """A process dies before its n-th call to the operating system, for every n; another one goes on from what is left.

    `os._exit` runs no `finally`, as `kill -9` does not.
    """
    path = tmp_path / "checkpoint.pt"
    save(numbered(1), path, keep)
    newest = 1
    for fatal in range(1, 20):
        child = os.fork()
        if not child:
            _die_before_call(fatal, links)
            save(numbered(newest + 1), path, keep)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found, file = load_newest(path, load)
        assert found["step"] in (newest, newest + 1), (fatal, found["step"])
        if links:
            assert file == path, "checkpoint.pt is never missing"
        newest = found["step"]
        if not died:
            break
        save(numbered(newest := newest + 1), path, keep)  # the resumed run's next save cleans up
        assert whole(path) == newest
        names = {file.name for file in tmp_path.iterdir()}
        assert names <= {"checkpoint.pt", *(f"checkpoint.prev{n}.pt" for n in range(1, keep))}
    assert not died and fatal > (5 if keep > 1 else 3), "every moment has been tried"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="dies in a forked process")
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_death_at_any_moment_of_replacing_a_folder_leaves_a_whole_newest_one(tmp_path, keep):
    """As above, for folders, which can't be renamed over each other: the newest may for a moment be number 1."""
    path, new = tmp_path / "checkpoint.dcp", tmp_path / "new"

    def put(number: int) -> None:
        files.remove(new)
        new.mkdir()
        save(numbered(number), new / "state.pt")
        files.replace_folder(new, path, keep)

    for newest in range(1, 4):
        put(newest)
    assert len([path, *kept(path)]) == keep
    for fatal in range(1, 30):
        child = os.fork()
        if not child:
            _die_before_call(fatal, links=True)
            put(newest + 1)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found, _ = load_newest(path, lambda folder: load(folder / "state.pt"))
        assert found["step"] in (newest, newest + 1), (fatal, found["step"])
        if not died:
            break
        put(newest := found["step"] + 1)
        assert whole(path / "state.pt") == newest
        names = {file.name for file in tmp_path.iterdir()}
        assert names <= {"checkpoint.dcp", *(f"checkpoint.prev{n}.dcp" for n in range(1, keep))}
    assert not died and fatal > 7, "every moment has been tried"


def _die_before_call(number: int, links: bool) -> None:
    left = [number]

    def dying(call):
        def inner(*arguments, **keywords):
            left[0] -= 1
            if not left[0]:
                os._exit(9)
            return call(*arguments, **keywords)

        return inner

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        os.link = no_links
    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    Path.unlink = dying(Path.unlink)


def test_a_changed_byte_is_found_or_harmless(tmp_path):
    """torch itself reads altered weights without a word; here each altered byte is told, unless it carries nothing."""
    path = tmp_path / "checkpoint.pt"
    save(numbered(3), path)
    good, silent = path.read_bytes(), 0
    for place in range(0, len(good), 41):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        if (problem := _problem(path)) is None:
            assert whole(path) == 3
        else:
            assert str(path) in problem and "\n" not in problem
            silent += _torch_reads(path)
    assert silent > 100, "the checksum finds what torch does not"


def _problem(path: Path) -> str | None:
    try:
        load(path)
    except CheckpointError as error:
        return str(error)
    return None


def _torch_reads(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def test_a_damaged_newest_falls_back_and_says_so(tmp_path, caplog):
    path = tmp_path / "checkpoint.pt"
    for number in (1, 2, 3):
        save(numbered(number), path, keep=3)
    assert load_newest(path, load)[1] == path and not caplog.records
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        content, file = load_newest(path, load)
    assert content["step"] == 2 and file == tmp_path / "checkpoint.prev1.pt"
    (record,) = caplog.records
    assert "cut short" in record.getMessage() and str(file) in record.getMessage()
    file.write_bytes(b"")
    assert load_newest(path, load)[0]["step"] == 1
    path.unlink()
    assert load_newest(path, load)[0]["step"] == 1
    kept(path)[1].write_bytes(b"PK\3\4 no more than this")
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt: no such file"):
        load_newest(path, load)


def test_what_is_no_damage_is_not_passed_over(tmp_path):
    """A file that would run code, or that a person put there, is refused; an older one does not take its place."""
    path = tmp_path / "checkpoint.pt"
    save(numbered(1), path, keep=2)
    save(numbered(2), path, keep=2)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_newest(path, load)
    torch.save({"model": Malicious(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_newest(path, load)


def test_compressed_records_are_refused_before_they_grow(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(CheckpointError, match="compressed") as error:
        load(path)
    assert not isinstance(error.value, CorruptCheckpoint)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: files.write_text(folder / "config.yaml", "new"),
        lambda folder: files.write_json(folder / "ledger.json", {"new": 1}),
        lambda folder: save(numbered(2), folder / "checkpoint.pt", keep=2),
    ],
)
def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path, monkeypatch, write):
    for name in ("config.yaml", "ledger.json"):
        (tmp_path / name).write_text("old")
    save(numbered(1), tmp_path / "checkpoint.pt", keep=2)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device") as error:
            write(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", sorted(files.NO_ROOM))
def test_errors_that_name_no_file_get_the_folder(tmp_path, number):
    with pytest.raises(CheckpointError, match="last checkpoint is intact") as error, files.disk_full_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in str(error.value) and os.strerror(number) in str(error.value)
    with pytest.raises(FileNotFoundError, match="data"), files.disk_full_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file", "data")


# Foreign files


PLAIN = {
    "numpy": [np.float64(1.5), np.float32(2.5), np.int64(-7), np.bool_(True), np.dtype(">f8").type(3)],
    "pathlib": [Path("a/b"), PurePosixPath("/c")],
    "collections": [defaultdict(list, {"a": [1]}), OrderedDict(b=2), deque([1, 2], maxlen=3), Counter("aab")],
    "datetime": [datetime(2026, 1, 2, 3), timedelta(days=1), datetime(2026, 1, 2, tzinfo=timezone.utc)],
    "namespaces": [argparse.Namespace(lr=0.1, mean=(0.5, 0.5)), SimpleNamespace(lr=0.1)],
    "torch": [torch.Size([1, 2]), torch.device("cpu"), torch.float16, torch.__version__],
    "enumerations": [InterpolationMode.BICUBIC, Image.Resampling.BICUBIC],
    "builtins": [{1, 2}, frozenset({3}), slice(1, 2), range(3), b"bytes", 1j, None],
}
LEFT_OUT = {
    "arrays": [np.arange(3), np.array([{}], dtype=object), np.random.get_state()[1]],
    "NumPy's strings and times": [np.str_("a"), np.datetime64("2026-01-01")],
    "types": [np.float32, uuid.uuid4()],
}


def beside_weights(value: object, path: Path, legacy: bool = False) -> Path:
    torch.save({"model": {"w": torch.ones(2)}, "args": value}, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", PLAIN)
def test_harmless_objects_beside_weights_come_as_plain_values(kind, legacy, tmp_path):
    content = load(beside_weights(PLAIN[kind], tmp_path / "x.pth", legacy))
    assert torch.equal(content["model"]["w"], torch.ones(2))
    for found, wrote in zip(content["args"], PLAIN[kind], strict=True):
        if isinstance(wrote, Path | PurePosixPath):
            wrote = str(wrote)
        elif isinstance(wrote, Enum):
            wrote = wrote.value
        elif isinstance(wrote, deque):
            wrote = list(wrote)
        elif isinstance(wrote, SimpleNamespace):
            wrote = argparse.Namespace(**vars(wrote))
        assert found == wrote


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_other_harmless_objects_are_left_out(kind, tmp_path):
    content = load(beside_weights(LEFT_OUT[kind], tmp_path / "x.pth"))
    assert torch.equal(content["model"]["w"], torch.ones(2))
    assert all(found is LeftOut or isinstance(found, LeftOut) for found in content["args"])


class Calls:
    """Pickled as a call of any function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class State:
    """Pickled as a class that a file sets any state of."""

    def __init__(self, kind: type, *arguments: object, state: object) -> None:
        self.call = kind, arguments, state

    def __reduce__(self):
        return self.call


def attacks(marker: Path) -> dict[str, object]:
    code = f"__import__('os').mkdir({str(marker)!r})"
    inner = pickle.dumps(Malicious(marker))
    return {
        "mkdir": Malicious(marker),
        "system": Calls(os.system, f"mkdir {marker}"),
        "subprocess": Calls(subprocess.call, ["mkdir", str(marker)]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "getattr": Calls(getattr, Calls(__import__, "os"), "mkdir"),
        "a pickle within": Calls(pickle.loads, inner),
        "a storage's pickle": Calls(torch.storage._load_from_bytes, inner),
        "a function on disk": Calls(runpy.run_path, str(marker)),
        "a default factory": defaultdict(os.getcwd, {"a": 1}),
        "within an array": np.array([Malicious(marker)], dtype=object),
        "within a number": Calls(np_scalar, np.dtype("O"), Malicious(marker)),
        "within a path": Calls(PosixPath, Malicious(marker)),
        "within a namespace": argparse.Namespace(a=Malicious(marker)),
        "within a date": Calls(datetime, Malicious(marker)),
        "as a class of numpy": Calls(np.load, str(marker)),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("attack", attacks(Path()))
def test_what_could_run_is_refused_and_never_runs(attack, legacy, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "x.pth"
    beside_weights(attacks(marker)[attack], path, legacy)
    with pytest.raises(CheckpointError, match="could run code") as error:
        load(path)
    assert not marker.exists()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", HARMLESS)
def test_no_stand_in_does_anything_with_what_a_file_gives_it(name, tmp_path):
    """Each is called, made and given a state with arguments of the file's choice."""
    before = {**sys.modules}, os.getcwd(), dict(os.environ)
    for arguments in ((), ("os",), ("os", "system"), (b"\0" * 8,), (3, 4, 5), ({"__class__": "x"},), ([1],)):
        for use in (HARMLESS[name], lambda *a: HARMLESS[name].__new__(HARMLESS[name], *a)):
            with contextlib.suppress(TypeError, ValueError, OverflowError, AttributeError, LookupError):
                made = use(*arguments)
                if hasattr(made, "__setstate__") and not isinstance(made, type):
                    made.__setstate__(arguments)
    assert ({**sys.modules}, os.getcwd(), dict(os.environ)) == before and not list(tmp_path.iterdir())


def test_the_way_out_that_is_named_works(tmp_path):
    path, out = beside_weights(uuid.SafeUUID.safe, tmp_path / "x.pth"), tmp_path / "y.pth"
    with pytest.raises(CheckpointError, match=r"uuid\.SafeUUID") as error:
        load(path)
    (way,) = re.findall(r"torch\.save\(.*NEW_FILE\)", str(error.value))
    exec(way, {"torch": torch, "FILE": path, "NEW_FILE": out})
    assert torch.equal(load(out)["w"], torch.ones(2))
    torch.save(torch.nn.Linear(2, 1), path)
    with pytest.raises(CheckpointError, match=r"nn\.modules\.linear\.Linear") as error:
        load(path)
    assert "['model'] where" in str(error.value) and ".state_dict()" in str(error.value)
    exec(way.replace("['model']", ".state_dict()"), {"torch": torch, "FILE": path, "NEW_FILE": out})
    assert load(out).keys() == {"weight", "bias"}


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def packed(save: Callable, *arguments: object, **named: object) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arguments, **named)
    return buffer.getvalue()


def tarred(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))


def script() -> bytes:
    return packed(lambda file: torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 1), torch.ones(2)), file))


WEIGHTS = {"w": torch.ones(300)}
TORCH = packed(lambda file: torch.save(WEIGHTS, file))
#: Content of a file -> what the error says; made when needed.
FOREIGN_FILES = {
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n", "git lfs pull"),
    "html": (lambda: b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>", "an HTML page"),
    "html 2": (lambda: b"\n\n  <!-- x --><HTML lang='en'>", "an HTML page"),
    "json": (lambda: b'{"error": "Repository not found"}', r"text that begins with '{\"error\": \"Repository"),
    "text": (lambda: b"Entry not found", "text that begins with 'Entry not found'"),
    "npz": (lambda: packed(np.savez, a=np.ones(3)), r"NumPy archive \(\.npz\)"),
    "compressed npz": (lambda: packed(np.savez_compressed, a=np.ones(3)), r"NumPy archive \(\.npz\)"),
    "npy": (lambda: packed(np.save, np.ones(3)), r"NumPy array \(\.npy\)"),
    "gzip": (lambda: gzip.compress(TORCH), "compressed by gzip"),
    "bz2": (lambda: bz2.compress(TORCH), "compressed by bzip2"),
    "xz": (lambda: lzma.compress(TORCH), "compressed by xz"),
    "zip": (lambda: zipped({"release/model.pth": TORCH}), r"zip archive \(first: release/model\.pth\)"),
    "tar": (lambda: packed(tarred), "tar archive"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "pickle": (lambda: pickle.dumps({"w": np.ones(30)}), "a pickle, but not of torch.save"),
    "pickle 2": (lambda: pickle.dumps({"w": np.ones(30)}, protocol=2), "a pickle, but not of torch.save"),
    "torchscript": (script, r"TorchScript.*torch\.jit\.load"),
    "protocol 4": (lambda: packed(lambda f: torch.save(WEIGHTS, f, pickle_protocol=4)), "without running code"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_foreign_files_are_named(kind, suffix, tmp_path):
    content, said = FOREIGN_FILES[kind]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content())
    with pytest.raises(CheckpointError, match=said) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not isinstance(error.value, CorruptCheckpoint), "nothing that a crash leaves: no older file takes its place"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_cut_files_are_told_apart_from_foreign_ones(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    for content, said in ((b"", r"empty \(0 bytes\)"), (TORCH[:-100], "cut short: it begins as one, but its end is")):
        path.write_bytes(content)
        with pytest.raises(CorruptCheckpoint, match=said):
            read(path)
    save_safetensors(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptCheckpoint, match="not a safetensors file, or cut short"):
        read(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ""])
def test_files_are_read_whatever_they_are_called(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    save_safetensors(WEIGHTS, path, {"note": "x"})
    content, metadata = read(path)
    assert torch.equal(content["w"], WEIGHTS["w"]) and metadata == {"format": "pt", "note": "x"}
    assert torch.equal(load(path)["w"], WEIGHTS["w"])
    for new in (True, False):
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=new)
        content, metadata = read(path)
        assert torch.equal(content["w"], WEIGHTS["w"]) and metadata == {}


def test_equal_weights_give_equal_bytes_in_every_process(tmp_path):
    """safetensors itself orders the metadata at random, and Python's sets differ by process: one of two is this one."""
    code = (
        "import torch; from mae_et.engine.storage import save_safetensors\n"
        "state = {'ä.bias': torch.ones(3, dtype=torch.bfloat16), 'a': torch.arange(5.), 'c': torch.ones(())}\n"
        "save_safetensors(state, path, {f'key{n}': 'ö' * n for n in range(9)})"
    )
    exec(code, {"path": str(tmp_path / "1.safetensors")})
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    other = "import sys; path = sys.argv[1]\n" + code
    subprocess.run([sys.executable, "-c", other, str(tmp_path / "2.safetensors")], env=environment, check=True)
    (content,) = {file.read_bytes() for file in tmp_path.iterdir()}
    found, metadata = read(tmp_path / "1.safetensors")
    assert metadata == {"format": "pt"} | {f"key{n}": "ö" * n for n in range(9)}
    theirs = safetensors.torch.load(content)
    assert found.keys() == theirs.keys() == {"ä.bias", "a", "c"}
    assert torch.equal(theirs["a"], torch.arange(5.0)) and theirs["ä.bias"].dtype == torch.bfloat16


def test_tensors_of_safetensors_stay_aligned(tmp_path):
    for length in range(9):
        save_safetensors(WEIGHTS, tmp_path / "x.safetensors", {"note": "x" * length})
        content = (tmp_path / "x.safetensors").read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0
        assert torch.equal(safetensors.torch.load(content)["w"], WEIGHTS["w"])


# Addresses


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder, the address it is served at, and the requests so far; torch.hub keeps its files in a folder beside."""
    folder, requests = tmp_path / "site", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

        def send_head(self):
            if self.path.startswith("/short"):  # promises more than it sends
                content = TORCH[:-100]
                self.send_response(200)
                self.send_header("Content-Length", str(len(TORCH)))
                self.end_headers()
                return io.BytesIO(content)
            return super().send_head()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def test_an_address_is_downloaded_once(site, tmp_path):
    folder, address, requests = site
    for name, value in (("a", 1.0), ("b", 2.0)):
        (folder / name).mkdir()
        torch.save({"w": torch.full((3,), value)}, folder / name / "model.pth")
    paths = [local_file(f"{address}/{name}/model.pth?download=1") for name in "abab"]
    assert len(requests) == 2 and paths[:2] == paths[2:]
    assert [load(path)["w"][0].item() for path in paths[:2]] == [1, 2], "addresses that end alike are kept apart"
    assert all(path.is_relative_to(tmp_path / "hub") and path.name == "model.pth" for path in paths)


@pytest.mark.parametrize(
    "source", ["runs/x", "vit_tiny_patch16_224", "hfds/x", "C:\\x.pth", "hf-hub:timm/x", Path("/x")]
)
def test_paths_and_names_are_no_addresses(source):
    assert local_file(source) is None


def test_what_is_no_checkpoint_is_not_kept(site, tmp_path):
    folder, address, _ = site
    (folder / "page.pth").write_bytes(b"<!DOCTYPE html><html>")
    for name, said in (
        ("page.pth", "is an HTML page"),
        ("short.pth", "cut short"),
        ("missing.pth", "can't be downloaded"),
        ("..", "can't be downloaded|is an HTML page"),
    ):
        with pytest.raises(CheckpointError, match=said) as error:
            local_file(f"{address}/{name}")
        assert f"{address}/{name}" in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    torch.save(WEIGHTS, folder / "page.pth")
    assert torch.equal(load(local_file(f"{address}/page.pth"))["w"], WEIGHTS["w"])


def test_no_network_is_one_line_with_a_place_for_the_file(site, monkeypatch):
    _, address, _ = site

    def unreachable(*_, **__):
        raise URLError(OSError(errno.EHOSTUNREACH, "No route to host"))

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(CheckpointError, match="No route to host") as error:
        local_file(f"{address}/x.pth")
    assert "\n" not in str(error.value)
    (place,) = re.findall(r"put the file at (\S+)", str(error.value))
    torch.save(WEIGHTS, place)
    assert local_file(f"{address}/x.pth") == Path(place)
    with pytest.raises(ValueError, match="only http:// and https://"):
        local_file("s3://bucket/x.pth")

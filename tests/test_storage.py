"""A checkpoint is never lost: not to a kill at any moment of a save, a full disk, or bytes that change on the disk."""

from __future__ import annotations

import errno
import logging
import os
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import Malicious

from mae_et import files
from mae_et.engine.storage import load, save
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

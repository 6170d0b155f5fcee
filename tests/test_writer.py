"""What is saved is what was there when it was asked for, whatever training does while it is written."""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny import assert_same, tiny, weights

from mae_et.engine import sharded, storage
from mae_et.engine.pretrain import pretrain
from mae_et.engine.runtime import Runtime
from mae_et.engine.writer import Writer
from mae_et.files import CheckpointError


@pytest.mark.usefixtures("one_thread")
def test_training_goes_on_while_a_save_is_written(
    photos: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No save is written before another step is made, and none is begun before the last one is written. The files
    are, byte for byte, those of saving at once, and a run that goes on from one ends as the one that wrote it."""
    module = sys.modules["mae_et.engine.pretrain"]
    steps, begun, written, drawn_by = [0], [], [], []
    take_step, snapshot, save, write_sheet = module.take_step, sharded.snapshot, storage.save, module.write_sheet

    def counting(run, *arguments):
        steps[0] = run.step
        return take_step(run, *arguments)

    def save_at_once_too(state: dict, *arguments, full: bool) -> dict:
        assert begun == written
        begun.append(state["step"])
        save(sharded._map(state, lambda _, value: value), tmp_path / f"at-once-{state['step']}.pt")
        return snapshot(state, *arguments, full=full)

    def save_slowly(state: dict, path: Path, keep: int) -> None:
        deadline = time.monotonic() + 30
        while steps[0] < min(state["step"] + 1, last) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert time.monotonic() < deadline, "the run waited for its save"
        save(state, path, keep)
        (tmp_path / f"written-{state['step']}.pt").write_bytes(path.read_bytes())
        written.append(state["step"])

    def noting_the_thread(*arguments) -> None:
        drawn_by.append(threading.current_thread())
        write_sheet(*arguments)

    last = weights_step(whole) - 1
    with monkeypatch.context() as patched:
        patched.setattr(module, "take_step", counting)
        patched.setattr(module, "write_sheet", noting_the_thread)
        patched.setattr(sharded, "snapshot", save_at_once_too)
        patched.setattr(storage, "save", save_slowly)
        folder = pretrain(tiny(photos, tmp_path / "run", save_steps=5, picture_steps=10))
    assert written == begun and len(written) > 4
    for step in set(written):
        assert read_bytes(tmp_path, "written", step) == read_bytes(tmp_path, "at-once", step), step
    assert len(drawn_by) == last // 10 + 1 and threading.main_thread() not in drawn_by
    assert len(list(folder.glob("reconstruction-*.png"))) == last // 10 and (folder / "progress.png").exists()
    assert_same(weights(folder), weights(whole))
    resumed = pretrain(tiny(photos, tmp_path / "resumed", resume=str(tmp_path / "written-10.pt")))
    assert_same(weights(resumed), weights(whole))


def weights_step(folder: Path) -> int:
    return storage.load(folder / "checkpoint.pt")["step"]


def read_bytes(folder: Path, kind: str, step: int) -> bytes:
    return (folder / f"{kind}-{step}.pt").read_bytes()


def test_a_snapshot_shares_no_memory() -> None:
    live = {"model": {"w": torch.ones(3)}, "step": torch.tensor(1.0), "groups": [{"lr": 0.1}]}
    copy = sharded.snapshot(live, Runtime(torch.device("cpu"), "fp32"), full=True)
    live["model"]["w"] += 1
    live["step"] += 1
    assert torch.equal(copy["model"]["w"], torch.ones(3)) and copy["step"] == 1
    other = sharded.snapshot(live, Runtime(torch.device("cpu"), "fp32", rank=1, world_size=2), full=True)
    assert other == {"model": {"w": None}, "step": None, "groups": [{"lr": 0.1}]}, "another rank keeps no weights"


def fail() -> None:
    raise CheckpointError("checkpoint.pt: can't be written: No space left on device")


def test_an_error_is_raised_at_the_next_task_of_its_kind_or_at_the_end() -> None:
    done = []
    with Writer() as writer:
        writer.submit("save", fail)
        writer.submit("picture", lambda: done.append("picture"))
        with pytest.raises(CheckpointError, match="No space"):
            writer.submit("save", lambda: done.append("save"))
        writer.submit("save", lambda: done.append("save"))
        writer.wait()
        assert done == ["picture", "save"], "it is raised once, and the thread goes on"
    with pytest.raises(CheckpointError, match="No space"), Writer() as writer:
        writer.submit("save", fail)


def test_the_end_waits_and_another_error_stays_the_one_that_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    done = []

    def broken_run() -> None:
        with Writer() as writer:
            writer.submit("picture", lambda: (time.sleep(0.05), done.append("picture")))
            writer.submit("save", fail)
            raise FloatingPointError("loss is nan")

    with caplog.at_level(logging.ERROR), pytest.raises(FloatingPointError, match="loss is nan"):
        broken_run()
    assert done == ["picture"]
    assert [record.getMessage() for record in caplog.records] == [
        "checkpoint.pt: can't be written: No space left on device"
    ]

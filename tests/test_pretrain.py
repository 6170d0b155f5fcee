"""The real script, end to end: it trains, stops, resumes bit for bit, and explains mistakes in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from ranks import Child, on_ranks, running
from tiny import ROOT, TINY, assert_close, assert_same, recipe_file, script, tiny, weights
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from mae_et import checkpoint
from mae_et.cli import main_pretrain
from mae_et.data import workers
from mae_et.data.fingerprint import fingerprint
from mae_et.data.sources import Source, open_source
from mae_et.engine import runtime, step, storage
from mae_et.engine.pretrain import pretrain
from mae_et.engine.resume import check_images
from mae_et.engine.run import PretrainRun
from mae_et.evaluate.config import FinetuneConfig, ReconstructConfig
from mae_et.evaluate.probe import probe
from mae_et.evaluate.reconstruct import reconstruct
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import Stage
from mae_et.plan.flags import from_dict, from_recipe
from mae_et.plan.shapes import SPECTRAL, height_width
from mae_et.spectral import low_frequency_crop, low_pass


def test_run_folder(whole: Path) -> None:
    for name in ("config.yaml", "environment.json", "encoder.safetensors", "reconstruction.png"):
        assert (whole / name).stat().st_size > 0, name
    assert list(whole.glob("events.out.tfevents.*"))
    ledger = json.loads((whole / "ledger.json").read_text())
    small, large = ledger["stages"]
    assert (small["size_px"], large["size_px"]) == (16, 32)
    assert (
        small["images"] == 6 * small["steps"] == pytest.approx(80, abs=3)
    )  # one epoch's compute at a quarter of the area
    assert small["visible_patches"] == small["images"] * 1
    assert small["predicted_patches"] == small["images"] * 3
    assert large["visible_patches"] == large["images"] * 4
    assert ledger["total"]["flops"] == small["flops"] + large["flops"] > 0
    assert small["train_seconds"] > 0 and small["peak_memory_bytes"] > 0 and large["eval_seconds"] > 0
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["p"] == 1 and records[-1]["step"] == small["steps"] + large["steps"] - 1
    assert {r["size_px"] for r in records} == {16, 32}
    assert from_dict(PretrainConfig, yaml.safe_load((whole / "config.yaml").read_text()), "").curriculum == "custom"


def test_learns(photos: Path, tmp_path: Path) -> None:
    folder = pretrain(tiny(photos, tmp_path / "run", epochs=40, warmup_epochs=2, lr=3e-3, print_steps=10))
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_kill_at_any_step_and_resume_bit_for_bit(photos: Path, tmp_path: Path, whole: Path) -> None:
    """`kill -9` three times, once during a save, the last time in the second stage, past the end of the data."""
    run = tmp_path / "run"
    config = tiny(photos, run, resume="auto", save_steps=1, print_steps=1, num_workers=1)
    last = 0
    for steps in (3, 9, 15):
        process = Child(pretrain, tmp_path / "log.txt", config)
        _wait_for_step(run, steps, process)
        if steps == 9:
            _wait_for_a_save(run, process)
        process.kill()
        process.communicate()
        last = checkpoint.load(run / "checkpoint.pt")["step"]
        assert last >= steps
    assert last > 14, "the last kill must come after the first stage"
    pretrain(replace(config, num_workers=0))
    assert_same(weights(run), weights(whole))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "no step is reported twice"


def _wait_for_step(folder: Path, step: int, process: subprocess.Popen | Child) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists():
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            # Reported steps are saved a moment later, so wait for one more than is asked for.
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] > step:
                return
        if process.poll() is not None:
            return  # it was faster than us; it has then saved its last step
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[0])


def _wait_for_a_save(folder: Path, process: subprocess.Popen | Child) -> None:
    """Until a checkpoint is being written, or the process has ended."""
    while not (folder / ".checkpoint.pt.tmp").exists() and process.poll() is None:
        pass


@pytest.mark.usefixtures("one_thread")
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    photos: Path, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The two newest are cut short: the run goes on from the third, and ends where an undamaged one does."""
    config = tiny(photos, tmp_path / "run", save_steps=8, keep_checkpoints=4, resume="auto")
    folder = pretrain(config)
    newest, *older = (folder / "checkpoint.pt", *sorted(folder.glob("checkpoint.prev*.pt")))
    assert checkpoint.load(older[1])["step"] < checkpoint.load(newest)["step"]
    for file in (newest, older[0]):
        file.write_bytes(file.read_bytes()[:-50])
    pretrain(config)
    assert "going on from" in caplog.text and older[1].name in caplog.text
    assert_same(weights(folder), weights(whole))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "no step is reported twice"


@pytest.mark.usefixtures("one_thread")
def test_a_full_disk_keeps_the_last_checkpoint(
    photos: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up in mid-run; with room again, the run goes on and ends as if nothing had happened."""
    config = tiny(photos, tmp_path / "run", save_steps=5, resume="auto")
    left, real = [15], os.fsync

    def filling(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", filling)
        with pytest.raises(checkpoint.CheckpointError, match="No space left on device") as error:
            pretrain(config)
    assert str(tmp_path / "run") in str(error.value)
    assert not [file.name for file in (tmp_path / "run").iterdir() if file.name.endswith((".tmp", ".link"))]
    assert 5 <= checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] < 30
    assert_same(weights(pretrain(config)), weights(whole))


def test_sigterm_saves_and_the_exit_code_tells(photos: Path, tmp_path: Path) -> None:
    """Half a run is not a run: `main_pretrain.py … && main_finetune.py …` must end."""
    config = TINY | {"data_path": str(photos), "output_dir": str(tmp_path / "run"), "epochs": 400, "warmup_epochs": 1}
    recipe = recipe_file(config | {"print_steps": 1}, tmp_path / "r.yaml")
    # As Slurm does, signal the whole process group, loader processes included.
    process = script("--recipe", str(recipe), "--num_workers", "2", start_new_session=True)
    _wait_for_step(tmp_path / "run", 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped and saved" in output and "Traceback" not in output
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"]
    assert saved == json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] + 1


def test_ctrl_c_ends_the_loop_of_a_shell_too() -> None:
    """It does where the process dies of the signal; one that exits with 130 would leave the next turn to run."""
    code = "from mae_et.cli import explain\ndef run(): raise KeyboardInterrupt\nexplain('x', run)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (-signal.SIGINT, "")


class Terminating:
    """A source in which reading image 3 sends SIGTERM to the loader process that reads it."""

    def __init__(self, source) -> None:
        self.source, self.trainer = source, os.getpid()

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, index: int):
        if index == 3 and os.getpid() != self.trainer:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.source.read(index)


def test_loader_processes_leave_signals_to_the_trainer(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm and `timeout` signal them too; the run goes on to its end, since only they were asked to stop."""
    module = sys.modules["mae_et.engine.pretrain"]
    monkeypatch.setattr(module, "open_source", lambda *where: Terminating(open_source(*where)))
    folder = pretrain(tiny(photos, tmp_path / "run", num_workers=1, epochs=1))
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["p"] == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_ranks_equal_one(photos: Path, tmp_path: Path, whole: Path, ranks: int) -> None:
    """Same data, masks and total batch, in micro-batches that are uneven on 2 and 4 ranks: the same losses, gradients
    and weights up to rounding."""
    config = tiny(photos, tmp_path / "run", total_batch_size=6, batch_size=2)
    on_ranks(ranks, tmp_path / "log", pretrain, config)
    assert f"{ranks} ranks" in (tmp_path / "log" / "rank0.txt").read_text()
    assert_close(tmp_path / "run", whole)


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two hosts with a network of their own between them: names of their network namespaces."""
    names, addresses = ("mae_et_a", "mae_et_b"), ("10.213.77.1", "10.213.77.2")
    commands = [f"link add {names[0]} type veth peer name {names[1]}"]
    for name, address in zip(names, addresses, strict=True):
        commands += [
            f"netns add {name}",
            f"link set {name} netns {name}",
            f"-n {name} addr add {address}/24 dev {name}",
        ]
        commands += [f"-n {name} link set {name} up", f"-n {name} link set lo up"]
    leftovers = [f"netns del {name}" for name in names]  # of a test that was killed
    try:
        for command in leftovers:
            subprocess.run(["ip", *command.split()], check=False, capture_output=True)
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces can't be made here: {error}")
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.long
def test_two_hosts_train_as_one_and_stop_when_one_dies(
    photos: Path, tmp_path: Path, whole: Path, two_hosts: tuple[str, str]
) -> None:
    """Two machines, as far as the network goes, of two ranks each. One loses its processes: the other ends within a
    minute and says why. Started again, they go on, and end as one process does."""
    run = tmp_path / "run"
    config = TINY | {"data_path": str(photos), "output_dir": str(run), "save_steps": 1, "print_steps": 1}
    recipe = recipe_file(config | {"total_batch_size": 6, "batch_size": 2}, tmp_path / "r.yaml")
    words = ["--recipe", str(recipe), "--resume", "auto"]

    def launch(attempt: int) -> list[Child]:
        """As torchrun --nnodes=2 --nproc_per_node=2 on each host would start them."""
        ranks = []
        for rank in range(4):
            host, local = two_hosts[rank // 2], rank % 2
            variables = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
            variables |= {"MASTER_ADDR": "10.213.77.1", "MASTER_PORT": 29411, "GLOO_SOCKET_IFNAME": host}
            environment = {name: str(value) for name, value in variables.items()}
            log = tmp_path / f"{attempt}-{rank}.txt"
            ranks.append(Child(main_pretrain, log, words, environment=environment, network=host))
        return ranks

    ranks = launch(1)
    _wait_for_step(run, 5, ranks[0])
    for lost in ranks[2:]:
        lost.kill()
    began = time.monotonic()
    output, _ = ranks[0].communicate(timeout=60)
    assert ranks[0].poll() not in (0, None) and time.monotonic() - began < 60
    assert "another rank has died" in output and "--resume auto" in output, output
    for rank in ranks[1:]:
        rank.communicate(timeout=60)
    assert 5 <= checkpoint.load(run / "checkpoint.pt")["step"] < 20

    ranks = launch(2)
    outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.poll() for rank in ranks] == [0] * 4, outputs
    assert_close(run, whole, same_lines=False)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
@pytest.mark.long
def test_a_rank_that_dies_is_restarted_and_the_run_goes_on(photos: Path, tmp_path: Path, whole: Path) -> None:
    """`kill -9` one rank: torchrun's own restart goes on to the end."""
    config = TINY | {"data_path": str(photos), "output_dir": str(tmp_path / "run"), "save_steps": 1, "print_steps": 1}
    recipe = recipe_file(config | {"total_batch_size": 6, "batch_size": 3}, tmp_path / "r.yaml")
    process = Child(_torchrun, tmp_path / "log.txt", ["--recipe", str(recipe), "--resume", "auto"])
    _wait_for_step(tmp_path / "run", 12, process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.poll() == 0, output
    assert_close(tmp_path / "run", whole, same_lines=False)


def _torchrun(words: list[str]) -> None:
    """As `torchrun --nproc_per_node=2 --max_restarts=1 main_pretrain.py …`, but ranks are forked from its agent."""
    flags = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--nproc_per_node=2", "--max_restarts=1"]
    launch, _, _ = config_from_args(parse_args([*flags, "--start_method=fork", "main_pretrain.py"]))
    elastic_launch(launch, main_pretrain)(words)


def test_what_does_not_fit_fails_before_the_first_step_and_before_a_run_is_replaced(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage needs the most memory; it is warmed before the first one begins."""
    loss, seen = PretrainRun.loss, []

    def too_large(run: PretrainRun, images: torch.Tensor, stage: Stage, noise: torch.Tensor) -> torch.Tensor:
        seen.append(stage.size_px)
        if stage.size_px == 32:
            raise torch.OutOfMemoryError("no memory")
        return loss(run, images, stage, noise)

    monkeypatch.setattr(PretrainRun, "loss", too_large)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(torch.OutOfMemoryError):
        pretrain(tiny(photos, tmp_path, overwrite=True))
    assert seen == [32] and [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(FileExistsError, match="already holds a run"):  # said before that, too
        pretrain(tiny(photos, tmp_path))
    assert seen == [32]


@pytest.mark.parametrize("operator", SPECTRAL)
def test_the_device_makes_images_small_as_lowfreq_says(photos: Path, tmp_path: Path, operator: str) -> None:
    config = tiny(photos, tmp_path, lowfreq=operator)
    with runtime.start("cpu", "fp32") as rt:
        run = PretrainRun.create(config, rt, 20)
    stage = run.curriculum.stages[0]
    assert height_width(stage.loader_px) == height_width(config.input_size) != height_width(stage.size_px)
    images = torch.randint(0, 256, (2, 3, *height_width(stage.loader_px)), dtype=torch.uint8)
    wanted = low_frequency_crop(run.normalize(images), stage.size_px, operator)
    assert run.prepare(images, stage).equal(wanted)
    assert run.prepare(images, replace(stage, cutoff_px=8)).equal(low_pass(wanted, 8))


@pytest.mark.parametrize(
    "change",
    [
        {"target": "hog"},
        {"lowfreq": "lanczos"},
        {"lowfreq": "scaled"},
        {"decoder": "cross", "predict_ratio": 0.5, "norm_pix_loss": True},
        {"early_large_batch": True, "max_batch_size": 12, "batch_size": 2, "total_batch_size": 6},
    ],
)
def test_variants_run(photos: Path, tmp_path: Path, change: dict) -> None:
    folder = pretrain(tiny(photos, tmp_path / "run", epochs=0.6, clip_grad=1.0, precision="bf16", **change))
    assert json.loads((folder / "ledger.json").read_text())["total"]["steps"] > 2
    drawn = reconstruct(ReconstructConfig(str(folder), out=str(tmp_path / "again.png")))
    assert drawn.stat().st_size > 0 and (folder / "reconstruction.png").exists()


def test_compiles_blocks_on_one_rank_too(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph without breaks per kind of block and stage, and for what is done to images before and after; none for
    pictures. A cheap backend stands in for inductor."""
    graphs: list = []
    backend = partial(torch.compile, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    monkeypatch.setattr(torch, "compile", backend)
    folder = pretrain(tiny(photos, tmp_path / "run", compile=True, precision="bf16", picture_steps=2, num_workers=0))
    assert (
        len(json.loads((folder / "ledger.json").read_text())["stages"]) == 2
        and (folder / "reconstruction.png").exists()
    )
    assert len(graphs) == 2 * 2 + 3  # normalised are images of one size, compared those of two


def test_non_square_grey(photos: Path, tmp_path: Path) -> None:
    folder = pretrain(
        tiny(photos, tmp_path / "run", in_chans=1, input_size=[32, 16], curriculum="et_pp", mask_ratio=0.5)
    )
    assert [s["size_px"] for s in json.loads((folder / "ledger.json").read_text())["stages"]] == [
        [16, 8],
        [24, 16],
        [32, 16],
    ]


def test_non_finite_loss_stops_before_the_update(photos: Path, tmp_path: Path) -> None:
    config = tiny(photos, tmp_path / "run", lr=1e30, warmup_epochs=0, save_steps=1)
    with pytest.raises(FloatingPointError, match=r"at step \d+ in stage 1 \(16 px\)"):
        pretrain(config)
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run").values())


def test_non_finite_gradient_never_reaches_the_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss with an infinite gradient at a step that saves: the saved weights stay finite."""
    module = step
    original = module.accumulate_gradients

    seen = []

    def broken(run, batches, stage):
        seen.append(run)
        result = original(run, batches, stage)
        if run.step == 4:
            run.model.mask_token.grad.fill_(float("inf"))
        return result

    monkeypatch.setattr(module, "accumulate_gradients", broken)
    with pytest.raises(FloatingPointError, match="norm inf at step 4"):
        pretrain(tiny(photos, tmp_path / "run", save_steps=1, print_steps=1, clip_grad=1.0))
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert state["step"] == 4
    assert all(torch.isfinite(parameter).all() for parameter in seen[0].model.parameters())
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Without blanks: lines are wrapped."""
    return "".join(capsys.readouterr().out.split())


def test_overwrite_keeps_the_old_run_until_the_new_one_has_data(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretrain(tiny(photos, tmp_path / "run", epochs=0.6))
    before = (folder / "checkpoint.pt").read_bytes()
    junk = tmp_path / "junk"
    junk.mkdir()
    (junk / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="damaged"):
        pretrain(tiny(junk, folder, overwrite=True))
    assert (folder / "checkpoint.pt").read_bytes() == before
    for name in ("timing.json", "eval-knn.json"):
        (folder / name).write_text("{}")  # of the old run
    (folder / "finetune").mkdir()
    pretrain(tiny(photos, folder, epochs=0.7, overwrite=True))
    assert f"--overwrite: finetune in {folder} stays, of the run that was there".replace(" ", "") in said(capsys)
    assert not (folder / "timing.json").exists() and not (folder / "eval-knn.json").exists()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["epochs"] == 0.7 and config["overwrite"] is False


def test_refuses_to_resume_another_run(photos: Path, tmp_path: Path, whole: Path) -> None:
    def refused(match: str, **changes) -> None:
        before = (whole / "checkpoint.pt").read_bytes()
        with pytest.raises((ValueError, OSError, checkpoint.CheckpointError), match=match):
            pretrain(tiny(photos, whole, **changes))
        assert (whole / "checkpoint.pt").read_bytes() == before

    refused("mask_ratio was 0.75, is 0.5", resume="auto", mask_ratio=0.5)
    refused("total_batch_size", resume="auto", batch_size=5)
    refused("already holds a run")
    (tmp_path / "torn.pt").write_bytes((whole / "checkpoint.pt").read_bytes()[:5000])
    refused("torn.pt", resume=str(tmp_path / "torn.pt"))
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    refused("not a pretraining checkpoint", resume=str(tmp_path / "foreign.pt"))
    state = checkpoint.load(whole / "checkpoint.pt")
    checkpoint.save(state | {"head": {}}, tmp_path / "tuned.pt")
    refused("is a checkpoint of fine-tuning; that goes on with main_finetune.py", resume=str(tmp_path / "tuned.pt"))
    checkpoint.save(state | {"stages": [s | {"colour": 1} for s in state["stages"]]}, tmp_path / "newer.pt")
    refused(r"newer.pt holds colour: a newer mae_et has written it", resume=str(tmp_path / "newer.pt"))
    checkpoint.save(state | {"shape": state["shape"] | {"colour": 1}}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match=r"newer.pt: its shape holds colour: a newer"):
        checkpoint.read_pretrained(tmp_path / "newer.pt")
    refused("no checkpoint there", resume=str(tmp_path / "missing.pt"))
    # Going on from elsewhere must not replace the run that the output folder holds.
    other = pretrain(tiny(photos, tmp_path / "other", epochs=1))
    with pytest.raises(FileExistsError, match="already holds a run"):
        pretrain(tiny(photos, other, resume=str(whole)))


def test_a_finished_run_that_is_resumed_stays_as_it_is(photos: Path, tmp_path: Path, whole: Path) -> None:
    """Flags and machine of a call that ran no step once stood in its folder as how it was made."""
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    pretrain(tiny(photos, whole, resume="auto", precision="bf16", num_workers=1))
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    copied = pretrain(tiny(photos, tmp_path / "copied", resume=str(whole)))
    assert_same(weights(copied), weights(whole))
    assert (copied / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]  # else `compare` takes it for unfinished
    unfinished = tmp_path / "unfinished"
    shutil.copytree(whole, unfinished)
    (unfinished / "encoder.safetensors").unlink()  # as a run that was killed at its end leaves it
    pretrain(tiny(photos, unfinished, resume="auto"))
    assert (unfinished / "encoder.safetensors").read_bytes() == before["encoder.safetensors"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data_path {tmp}/none", ["--data_path", "none"]),
        ("--data_path {tmp}/empty", ["--data_path", "empty", "png"]),
        ("--input_size 30", ["30", "divisible", "32"]),
        ("--input_size 8 --curriculum vanilla", ["8 px is one patch of 8 px"]),
        ("--recipe {tmp}/own.yaml", ["own.yaml", "`stages`", "curriculum: custom"]),
        ("--recipe {tmp}/own.yaml --curriculum custom", ["own.yaml", "`stages`", "curriculum: custom"]),
        ("--recipe {tmp}/twice.yaml", ["twice.yaml", "key 'epochs' is there twice"]),
        ("--output_dir=", ["--output_dir is empty"]),
        ("--recipe dmo", ["--recipe", "did you mean demo", "in1k_vitb_etpp400_hog"]),
        ("--model vit_bas_patch16", ["vit_bas_patch16", "mae_vit_base_patch16"]),
        ("--lowfreq furier", ["--lowfreq", "fourier, dct, lanczos, bilinear, scaled"]),
        ("--mask_ratio 0.999", ["mask_ratio", "visible"]),
        ("--mask_ratio 0", ["mask_ratio", "visible"]),
        ("--target hog --norm_pix_loss", ["--norm_pix_loss", "--target hog"]),
        ("--epoch 3", ["--epoch", "perhaps you meant --epochs"]),
        ("--device cuda:99", ["--device", "auto"]),
        ("--recipe {tmp}/shares.yaml", ["shares", "add to 1", "0.9"]),
        ("--recipe {tmp}/unknown.yaml", ["unknown key 'epoch'", "epochs"]),
        ("--output_dir {tmp}/file/run", ["--output_dir"]),
        ("--output_dir {data}/run", ["--output_dir", "inside --data_path"]),
        ("--num_heads 0", ["--num_heads", "positive"]),
        ("--epochs inf", ["--epochs", "at most 1e9"]),
        ("--augment 50", ["--augment", "30"]),
        ("--world_size 4", ["--world_size", "torchrun"]),
    ],
)
def test_bad_input_is_one_line(
    photos: Path, tmp_path: Path, flags: str, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    recipe_file(TINY | {"stages": [{"size_px": 16, "share": 0.9}]}, tmp_path / "shares.yaml")
    recipe_file(TINY | {"epoch": 3}, tmp_path / "unknown.yaml")
    (tmp_path / "twice.yaml").write_text("epochs: 1\nlr: 1e-3\nepochs: 2\n")
    recipe_file({key: value for key, value in TINY.items() if key != "curriculum"}, tmp_path / "own.yaml")
    base = [] if "--recipe" in flags else ["--recipe", str(recipe_file(TINY, tmp_path / "tiny.yaml"))]
    if "--mask_ratio" in flags or "--input_size" in flags or "--model" in flags:
        base += ["--curriculum", "vanilla"]
    data = [] if "--data_path" in flags else ["--data_path", str(photos)]
    output = [] if "--output_dir" in flags else ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main_pretrain(base + data + output + flags.format(tmp=tmp_path, data=photos).split())
    assert stop.value.code not in (0, None)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]


def test_damaged_images(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for image in photos.iterdir():
        (folder / image.name).write_bytes(image.read_bytes())
    (folder / "07.png").write_bytes((photos / "07.png").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"07\.png.*|damaged_limit"):
        pretrain(tiny(folder, tmp_path / "strict"))
    pretrain(tiny(folder, tmp_path / "lenient", damaged_limit=0.05))
    assert "07.png" in capfd.readouterr().out.replace("\n", "")


def test_command_of_facebookresearch_mae(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """PRETRAIN.md's command, with only sizes reduced by further flags."""
    command = (
        f"--job_dir {tmp_path}/job --nodes 8 --use_volta32 --batch_size 64 --model mae_vit_large_patch16 "
        f"--norm_pix_loss --mask_ratio 0.75 --epochs 800 --warmup_epochs 40 --blr 1.5e-4 "
        f"--weight_decay 0.05 --data_path {photos} "
    )
    smaller = (
        "--input_size 32 --depth 1 --embed_dim 16 --num_heads 2 --decoder_depth 1 --decoder_embed_dim 16 "
        "--decoder_num_heads 2 --epochs 4 --warmup_epochs 1 --batch_size 8 --device cpu --num_workers 0"
    )
    main_pretrain([*command.split(), *smaller.split()])
    output = capfd.readouterr().out
    assert len(json.loads((tmp_path / "job" / "ledger.json").read_text())["stages"]) == 1
    assert "torchrun" in output  # what was asked of the launcher is not done silently


GOLDEN = Path(__file__).parent / "golden_losses.json"


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_golden_losses(whole: Path) -> None:
    """A refactor must not move them; a change that means to must write them anew and say so.

    They hold for this data, augmentation, initialisation and arithmetic, so a new release of torch, torchvision or
    Pillow may move them too: that is worth knowing.
    """
    assert losses(whole) == pytest.approx(json.loads(GOLDEN.read_text())["philox"], rel=1e-3)
    assert checkpoint.load(whole / "checkpoint.pt")["mask_generator"] == "philox"


@pytest.mark.usefixtures("one_thread")
def test_older_runs_go_on_with_their_masks(photos: Path, tmp_path: Path) -> None:
    """The losses are those of before Philox drew the masks, in a run that was resumed at its very beginning."""
    config, path = tiny(photos, tmp_path / "run"), tmp_path / "run" / "checkpoint.pt"
    with runtime.start("cpu", config.precision) as rt:
        run = PretrainRun.create(config, rt, 20)
        run.folder.mkdir()
        with run.writer:
            run.save()
    state = storage.load(path)
    del state["mask_generator"]
    storage.save(state, path)
    pretrain(replace(config, resume=str(path)))
    assert losses(run.folder) == pytest.approx(json.loads(GOLDEN.read_text())["mt19937"], rel=1e-3)
    assert checkpoint.load(path)["mask_generator"] == "mt19937"  # and so does whoever resumes this one


def test_a_resumed_run_has_the_learning_rate_that_it_had(photos: Path, tmp_path: Path) -> None:
    """Where every stage states its batch, --batch_size has no part in the plan, but --blr is for that many images."""
    stages = [{"size_px": size, "share": 0.5, "batch_size": 6} for size in (16, 32)]
    config = tiny(photos, tmp_path / "run", stages=stages, lr=None, blr=1e-2)
    pretrain(config)
    with pytest.raises(ValueError, match=r"the peak learning rate was 0.000234375, is 0.000117187: --blr times"):
        pretrain(replace(config, resume="auto", batch_size=3))
    pretrain(replace(config, resume="auto", batch_size=3, total_batch_size=6))


def test_a_rate_that_would_grow_is_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tiny(photos, tmp_path / "run", epochs=0.3, warmup_epochs=0, min_lr=0.1))
    assert "--min_lr0.1isabovethepeak,0.001:thelearningrategrowstowardstheend" in said(capsys)
    pretrain(tiny(photos, tmp_path / "other", epochs=0.3, warmup_epochs=0, min_lr=1e-3))
    assert "min_lr" not in said(capsys)


def test_a_plan_printed_as_a_recipe_is_one_of_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mae_et.cli import main

    main(["plan", "--recipe", "fast", "--vs", "small", "--devices", "8", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    from_recipe(PretrainConfig, str(tmp_path / "printed.yaml"))


@pytest.mark.parametrize("command", ["pretrain", "plan", "search"])
def test_print_config_is_a_recipe(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mae_et.cli import main

    flags = ["--epochs", "7", "--data_path", str(tmp_path / "nowhere"), "--print_config"]
    main([command, "--recipe", "fashion_mnist_etpp", *flags])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    main([command, "--recipe", str(printed), "--print_config"])
    again = yaml.safe_load(capsys.readouterr().out)
    assert again | {"recipe": ""} == yaml.safe_load(printed.read_text()) | {"recipe": ""}
    assert again["epochs"] == 7 and again["curriculum"] == "et_pp"
    assert not again["print_config"], "a run of the recipe would print it again, and stop"


def test_commands(whole: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`python -m mae_et`: plan as JSON has the documented keys, reconstruct draws, mistakes are one line."""
    from mae_et.cli import main

    main(["plan", "--recipe", "in1k_vitb_etpp400_hog", "--vs", "in1k_vitb_mae1600", "--json"])
    report = json.loads(capfd.readouterr().out)
    assert [s["size_px"] for s in report["stages"]] == [96, 160, 224]
    keys = "size_px patches num_visible num_predicted passes steps images gflops_per_image compute_share".split()
    assert set(keys) <= report["stages"][0].keys()
    assert {"flops", "images", "passes", "steps"} <= report["totals"].keys()
    assert 3.95 <= report["vs"]["speedup_flops"] <= 4.01
    main(["reconstruct", str(whole), "--images", str(photos), "--out", str(tmp_path / "picture.png")])
    assert Image.open(tmp_path / "picture.png").size[0] > 300
    capfd.readouterr()
    for argv, words in (
        (["plan", "--recipe", "nope"], "--recipe"),
        (["recontruct"], "choose from"),
        ([], "command is missing"),
        (["reconstruct"], "required"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 1
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert words in line


FAILS = """
import os, sys, torch
from mae_et.data.workers import worker_options
class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 10**9
    def __getitem__(self, index):
        if index == 40:
            raise ValueError("fortieth")
        return index
def read():
    for number in torch.utils.data.DataLoader(Numbers(), **worker_options(2)):
        pass
cases = sys.argv[1:]
children = {}
for case in cases:  # processes as good as new, but for the seconds that it takes to import torch
    if not (child := os.fork()):
        os.dup2(os.open(case, os.O_WRONLY | os.O_CREAT), 2)
        break
    children[child] = case
else:
    failed = [children[os.wait()[0]] for _ in cases]
    sys.exit(0)
if case.endswith("in a child"):
    worker_options(0)
    child = torch.multiprocessing.get_context("fork").Process(target=read)
    child.start()
    child.join()
    sys.exit(child.exitcode)
if case.endswith("beside a pool"):
    pool = torch.multiprocessing.get_context("fork").Pool(2)
    pool.map(abs, range(8))
read()
"""


def test_an_error_in_a_worker_ends_the_process(tmp_path: Path) -> None:
    """Its workers leave SIGTERM to it, so multiprocessing would wait for them for ever."""
    files = [tmp_path / name for name in ("alone", "in a child", "beside a pool")]
    command = [sys.executable, "-c", FAILS, *map(str, files)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=180, check=True)
    for file in files:
        assert file.read_text().strip().endswith("fortieth"), f"{file.name}: nothing follows the message"


def test_other_images_of_the_same_number_are_no_way_to_go_on(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moved, others = tmp_path / "moved", tmp_path / "others"
    shutil.copytree(photos, moved)
    shutil.copytree(photos, others)
    for path in others.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    run = tmp_path / "run"
    pretrain(tiny(photos, run))
    pretrain(tiny(moved, run, resume="auto"))
    with pytest.raises(ValueError, match=r"trained on other images than those of --data_path .*others.* give --resume"):
        pretrain(tiny(others, run, resume="auto"))
    pretrain(tiny(others, run, resume=str(run / "checkpoint.pt")))
    assert "trained on other images" in capfd.readouterr().out.replace("\n", " ")


def test_an_image_that_could_not_be_read_for_a_moment_is_no_other(photos: Path, tmp_path: Path) -> None:
    source = open_source(str(photos), "train")
    whole = fingerprint(source)
    holes = fingerprint(Unread(source, 1))
    assert len(holes) == len(whole) - 1 == 19
    for before, now in ((whole, holes), (holes, whole), ({}, whole)):
        check_images("--resume auto", tmp_path, {"sampled_images": before}, now, "there")
    with pytest.raises(ValueError, match="number 0 differs"):
        check_images("--resume auto", tmp_path, {"sampled_images": holes}, holes | {"0": "0"}, "there")


class Unread:
    """A source that lacks an image for a moment."""

    def __init__(self, source: Source, missing: int) -> None:
        self.source, self.missing = source, missing

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int):
        if index == self.missing:
            raise OSError("stale file handle")
        return self.source.read(index)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"warmup_epochs": 50}, "rate never reaches its peak"),
        ({"hold_epochs": 1.5}, "rate never falls"),
        ({"curriculum": "vanilla", "epochs": 0.2, "warmup_epochs": 0.02}, "is 0: it never trains"),
        ({"curriculum": "vanilla", "epochs": 0.2, "warmup_epochs": 0}, ""),
        ({}, ""),
    ],
)
def test_a_warm_up_or_hold_as_long_as_the_run_is_said(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: dict, words: str
) -> None:
    pretrain(tiny(photos, tmp_path / "run", **flags))
    assert words in caplog.text and ("never" in caplog.text) == bool(words)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no folder here")
def test_a_killed_trainer_leaves_no_process_and_no_shared_memory(photos: Path, tmp_path: Path) -> None:
    """The trainer alone gets `kill -9`; its workers have to notice by themselves, even before they got going."""
    trainers = {}
    for name, task in (("training", pretrain), ("starting", _pretrain_with_late_workers)):
        config = tiny(photos, tmp_path / name, epochs=4000, warmup_epochs=1, print_steps=1, num_workers=2)
        trainers[name] = Child(task, tmp_path / f"{name}.txt", config, session=True)
    _wait_for_step(tmp_path / "training", 5, trainers["training"])
    families = {name: _family(process) for name, process in trainers.items()}
    for process in trainers.values():
        process.kill()
    deadline = time.monotonic() + 60  # torch's workers look for their trainer every 5 seconds
    while (left := [pid for each in trainers.values() for pid in running(each.pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes outlive their trainer"
    names = tuple(f"torch_{pid}_" for family in families.values() for pid in family)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(names)]


def _family(trainer: Child) -> list[int]:
    """Its processes, once it has two workers."""
    deadline = time.monotonic() + 60
    while len(family := running(trainer.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert trainer.pid in family and len(family) == 3, "a trainer and two workers"
    return family


def _pretrain_with_late_workers(config: PretrainConfig) -> None:
    begin, trainer = workers._start_worker, os.getpid()

    def late(worker: int) -> None:
        while os.getppid() == trainer:
            time.sleep(0.01)
        begin(worker)

    workers._start_worker = late
    pretrain(config)


def test_auto_begins_again_where_the_first_try_died_before_its_first_checkpoint(photos: Path, tmp_path: Path) -> None:
    """The line that docs/distributed.md prescribes for torchrun's --max_restarts."""
    config = tiny(photos, tmp_path / "run", resume="auto", epochs=0.5)
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "config.yaml", "environment.json"):
        (tmp_path / "run" / name).write_text(
            '{"step": 0, "loss": 9.0}\n' if name == "metrics.jsonl" else "left: over\n"
        )
    pretrain(config)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records and all(record["loss"] < 9 for record in records) and records[-1]["p"] == 1
    with pytest.raises(FileExistsError, match="already holds a run"):
        pretrain(replace(config, resume=""))


def test_twelve_bits_in_sixteen_train_and_evaluate_with_their_range(tmp_path: Path) -> None:
    """Values 776 to 1009 of 65535 are two grey levels as they are; the range is measured, stored and used again."""
    rng = np.random.default_rng(0)
    for label, low in (("dark", 776), ("light", 900)):
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        (tmp_path / "data" / "val" / label).mkdir(parents=True)
        for split, count in (("train", 12), ("val", 6)):
            for i in range(count):
                pixels = rng.integers(low, low + 110, (40, 40), dtype=np.uint16)
                Image.fromarray(pixels).save(tmp_path / "data" / split / label / f"{i}.png")
    run = pretrain(tiny(tmp_path / "data", tmp_path / "run", in_chans=1, batch_size=6))
    low, high = checkpoint.load(run / "checkpoint.pt")["value_range"]
    assert 770 <= low <= 785 and 1000 <= high <= 1012
    assert json.loads((run / "environment.json").read_text())["value_range"] == [low, high]
    result = probe(FinetuneConfig(finetune=str(run), knn=True, k=3, num_workers=0, device="cpu"))["knn"]
    assert result["top1"] == 100
    assert json.loads((run / "eval-knn.json").read_text())["record"]["value_range"] == [low, high]
    with pytest.raises(ValueError, match="value_range was None, is"):
        pretrain(tiny(tmp_path / "data", run, in_chans=1, batch_size=6, resume="auto", value_range=[0, 9]))


def test_a_checkpoint_that_one_rank_alone_sees_is_refused(photos: Path, tmp_path: Path, whole: Path) -> None:
    """The others used to wait for it for ever."""
    shutil.copytree(whole, tmp_path / "rank0")
    on_ranks(2, tmp_path / "log", _resume_apart, photos, tmp_path)


def _resume_apart(photos: Path, folder: Path) -> None:
    config = tiny(photos, folder / f"rank{os.environ['RANK']}", resume="auto", batch_size=3)
    with pytest.raises(ValueError, match="ranks differ in step: 0 to "):
        pretrain(config)


@pytest.mark.parametrize("resume", ["", "auto"])
def test_results_of_other_weights_are_not_taken_over(photos: Path, tmp_path: Path, resume: str) -> None:
    """Probes of foreign weights write to ./output_dir, too."""
    config = tiny(photos, tmp_path / "run", epochs=1, save_steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/eval-knn.json").write_text("{}")
    with pytest.raises(
        FileExistsError, match=r"holds results of other weights \(eval-knn.json\): choose another folder"
    ):
        pretrain(replace(config, resume=resume))
    pretrain(replace(config, overwrite=True))
    assert not (tmp_path / "run/eval-knn.json").exists()
    (tmp_path / "run/eval-knn.json").write_text("{}")  # of this run, which goes on
    (tmp_path / "run/checkpoint.prev1.pt").replace(tmp_path / "run/checkpoint.pt")
    (tmp_path / "run/encoder.safetensors").unlink()
    pretrain(replace(config, resume="auto"))
    assert (tmp_path / "run/encoder.safetensors").exists()


def test_a_start_after_the_last_step_is_refused(photos: Path, tmp_path: Path) -> None:
    config = tiny(photos, tmp_path / "run", epochs=4)
    with pytest.raises(ValueError, match=r"--start_epoch 3\.99: none of \d+ steps would be left"):
        pretrain(replace(config, start_epoch=3.99))
    with pytest.raises(ValueError, match=r"--start_epoch must be in \[0, --epochs 4\), got 4"):
        replace(config, start_epoch=4)

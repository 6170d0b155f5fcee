"""Steps of gpu_acceptance.py that tell whether results are right: parity, ranks, resuming, errors, evaluations.

A model is small enough for a CPU and wide enough for a GPU's real kernels. Distances are relative: of losses, or of all
gradients as one vector.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_acceptance import Report
from synthetic import loader_output, synthetic_run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mae_et import checkpoint, cli
from mae_et.engine import runtime
from mae_et.engine.pretrain import PretrainRun, warm_up
from mae_et.engine.step import take_step
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import Stage
from mae_et.plan.flags import parse
from mae_et.plan.shapes import height_width

SMALL = (
    "--model mae_vit_small_patch16 --depth 3 --decoder_depth 2 --decoder_embed_dim 256 --decoder_num_heads 8 "
    "--curriculum et_pp --epochs 400 --batch_size 16 --total_batch_size 16"
)
#: A run of a few steps in each of three stages, on the embedded photographs.
SHORT = f"{SMALL} --data_path photos --epochs 0.02 --warmup_epochs 0 --num_workers 2 --print_steps 5"
IMAGES = 8


def start_run(flags: str, rt: runtime.Runtime) -> PretrainRun:
    return synthetic_run(parse(PretrainConfig, [*flags.split(), "--data_path", "none"]), rt, 1281167)


def micro_batch(run: PretrainRun, stage: Stage, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random uint8 images [8, C, S, S] and mask noise [8, L], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    shape = IMAGES, run.config.in_chans, *height_width(stage.loader_px)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images, torch.rand(IMAGES, stage.patches, generator=generator)


def gradients(run: PretrainRun, stage: Stage, images: Tensor, noise: Tensor) -> tuple[float, Tensor]:
    """Loss, and all gradients as one vector of float64 on the CPU."""
    run.optimizer.zero_grad(set_to_none=True)
    loss = run.loss(run.prepare(images.to(run.rt.device), stage), stage, noise.to(run.rt.device))
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().cpu().flatten() for p in run.model.parameters() if p.requires_grad])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def parity(report: Report, work: Path) -> None:
    """The CPU's float32 against the GPU's, against bf16, each attention backend, and torch.compile."""
    cases = {"pixel": "--norm_pix_loss", "hog": "--target hog", "cross": "--decoder cross --predict_ratio 0.5"}
    for name, flags in cases.items():
        # Pixels at the edge of two orientations fall into either bin.
        loss_limit, gradient_limit = (1e-4, 1e-2) if name == "hog" else (2e-6, 1e-4)
        runs = {}
        for key, place in {"cpu": ("cpu", "fp32"), "fp32": ("cuda", "fp32"), "bf16": ("cuda", "bf16")}.items():
            with runtime.start(*place) as rt:
                runs[key] = start_run(f"{SMALL} {flags}", rt)
        for key in ("fp32", "bf16"):
            runs[key].model.load_state_dict(runs["cpu"].model.state_dict())
        for stage in runs["cpu"].curriculum.stages:
            batch, where = micro_batch(runs["cpu"], stage), f"{name}, {stage.size_px} px"
            (want, wanted), (loss, found), (rough, roughly) = (gradients(run, stage, *batch) for run in runs.values())
            report.below(f"loss in fp32, GPU to CPU, {where}", abs(loss / (want or 1) - 1), loss_limit)
            report.below(f"gradient in fp32, GPU to CPU, {where}", distance(found, wanted), gradient_limit)
            report.below(f"loss in bf16, to fp32, {where}", abs(rough / (want or 1) - 1), 1e-2)
            report.below(f"gradient in bf16, to fp32, {where}", distance(roughly, wanted), 3e-2)
    _attention_parity(report, runs["bf16"])
    _graph_parity(report)
    for precision, limit in {} if report.dry_run else {"fp32": 1e-4, "bf16": 3e-2}.items():
        with runtime.start("cuda", precision) as rt:
            eager, compiled = (start_run(f"{SMALL} --norm_pix_loss {flag}", rt) for flag in ("", "--compile"))
        compiled.model.load_state_dict(eager.model.state_dict())
        for stage in eager.curriculum.stages[:2]:
            batch = micro_batch(eager, stage)
            (_, wanted), (_, found) = gradients(eager, stage, *batch), gradients(compiled, stage, *batch)
            where = f"{precision}, {stage.size_px} px"
            report.below(f"gradient compiled, to eager, {where}", distance(found, wanted), limit)


def _graph_parity(report: Report) -> None:
    """Losses and gradient norms of steps that are replayed, with masks that change, to those of eager steps."""
    outcomes = {}
    for graphs in ("off", "on"):
        with runtime.start("cuda", "bf16") as rt:
            run = start_run(f"{SMALL} --norm_pix_loss --batch_size 8 --cuda_graphs {graphs}", rt)
            warm_up(run)
            steps = [(stage, loader_output(run, stage)) for stage in run.curriculum.stages for _ in range(2)]
            outcomes[graphs] = []
            for stage, batches in steps:
                outcomes[graphs].append(take_step(run, iter(batches), stage, 1e-3).tolist())
                run.step = 1 - run.step
    for column, name in ((0, "losses"), (2, "gradient norms")):
        pairs = [(a[column], b[column]) for a, b in zip(*outcomes.values(), strict=True)]
        report.below(f"{name} of replayed steps, to eager ones", max(abs(b - a) / (a or 1) for a, b in pairs), 1e-2)


def _attention_parity(report: Report, run: PretrainRun) -> None:
    stage = run.curriculum.stages[0]
    batch = micro_batch(run, stage)
    with sdpa_kernel(SDPBackend.MATH):
        _, wanted = gradients(run, stage, *batch)
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for backend in backends if report.dry_run else [*backends, SDPBackend.CUDNN_ATTENTION]:
        try:
            with sdpa_kernel(backend):
                _, found = gradients(run, stage, *batch)
        except RuntimeError as error:
            report.check(f"attention by {backend.name} runs", False, str(error)[:300])
        else:
            report.below(f"gradient, attention by {backend.name} to MATH", distance(found, wanted), 2e-2)


def sync(report: Report, work: Path) -> None:
    """No steady step waits for the GPU."""
    cases = "--target hog --clip_grad 1", "--decoder cross --norm_pix_loss --lowfreq scaled --opt muon", "--compile"
    for flags in cases[:2] if report.dry_run else (*cases, "--cuda_graphs off"):
        with runtime.start("cuda") as rt:
            run = start_run(f"{SMALL} {flags}", rt)
            for stage, batches in warmed(run):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    for _ in range(3):
                        take_step(run, iter(batches), stage, 1e-4)
                    problem = ""
                except RuntimeError as error:
                    problem = str(error)[:300]
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                report.check(f"no wait in a step, {flags}, {stage.size_px} px", not problem, problem, "")


def warmed(run: PretrainRun) -> Iterator[tuple[Stage, list[Tensor]]]:
    """Each stage, after two of its steps, with its micro-batches."""
    warm_up(run)
    for stage in run.curriculum.stages:
        batches = loader_output(run, stage)
        for _ in range(2):
            take_step(run, iter(batches), stage, 1e-4)
        yield stage, batches


def ranks(report: Report, work: Path) -> None:
    """DDP and FSDP2 over NCCL, of one rank: the losses of six steps in a row are those of a plain model."""
    plain = _losses_of_steps("--cuda_graphs off", wrap=False)[1]
    modes = "--cuda_graphs off", "--cuda_graphs on", "--fsdp", "--fsdp --activation_checkpointing", "--compile"
    for flags in modes[:-1] if report.dry_run else modes:
        kind, losses = _losses_of_steps(flags, wrap=True)
        report.check(f"wrapped, {flags}", "Parallel" in kind or "FSDP" in kind, kind)
        apart = max(abs(a - b) / (abs(b) or 1) for a, b in zip(losses, plain, strict=True))
        report.below(f"losses of {kind}, {flags}, to a plain model's", apart, 5e-3)


def _losses_of_steps(flags: str, wrap: bool) -> tuple[str, list[float]]:
    """What the model is wrapped in, and losses of two steps in each stage."""
    os.environ["MAE_ET_WRAP"] = str(int(wrap))
    with runtime.start("cuda", "bf16") as rt:
        run = start_run(f"{SMALL} --norm_pix_loss --clip_grad 1 {flags}", rt)
        warm_up(run)
        losses = []
        for stage in run.curriculum.stages:
            batches = loader_output(run, stage)
            losses += [take_step(run, iter(batches), stage, 1e-3)[0].item() for _ in range(2)]
        run.graphs.clear()  # they are of DDP's buffers, too
        return type(run.network).__name__, losses


def resume(report: Report, work: Path) -> None:
    """With --deterministic, a run, the same again, and one that was stopped and resumed have equal weights."""
    for name in ("one", "again"):
        pretrain(f"{SHORT} --deterministic --save_steps 1 --keep_checkpoints 4", work / name)
    wanted = digest(work / "one")
    report.check("two runs are equal bit for bit", digest(work / "again") == wanted)
    stopped = work / "stopped"
    shutil.rmtree(stopped, ignore_errors=True)
    stopped.mkdir()
    earlier = sorted((work / "one").glob("checkpoint*prev*"))[-1]
    step = checkpoint.load(earlier)["step"]
    cli.main_pretrain([*f"{SHORT} --deterministic".split(), "--output_dir", str(stopped), "--resume", str(earlier)])
    report.check(f"resumed at step {step} it is equal bit for bit", digest(stopped) == wanted and step > 0)
    for name in ("free", "free_again"):
        pretrain(SHORT, work / name)
    report.note("two runs are equal without --deterministic", digest(work / "free") == digest(work / "free_again"))


def pretrain(flags: str, folder: Path) -> None:
    cli.main_pretrain([*flags.split(), "--output_dir", str(folder), "--overwrite"])


def digest(folder: Path) -> str:
    """Of all weights."""
    state = checkpoint.load(folder / "checkpoint.pt")["model"]
    return hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()


def out_of_memory(report: Report, work: Path) -> None:
    """It is told in one line that names the flag, with exit status 1."""
    torch.cuda.set_per_process_memory_fraction(0.02)
    flags = "--recipe in1k_vitb_etpp400 --data_path photos --batch_size 256 --total_batch_size 256 --num_workers 1"
    status, line = _last_words(lambda: pretrain(flags, work / "out_of_memory"))
    report.check("out of memory is one line", status == 1 and "out of memory: lower --batch_size" in line, line)


def downstream(report: Report, work: Path) -> None:
    """Pretraining with pictures, and every evaluation of what it leaves, end."""
    status, line = _last_words(lambda: pretrain(f"{SHORT} --norm_pix_loss --picture_steps 10", work / "pretrained"))
    report.check("pretraining with pictures", not status, line)
    evaluations = {
        "kNN": "--knn",
        "linear probe": "--linear_probe",
        "linear probe of augmented images": "--linear_probe --features augmented --epochs 1 --total_batch_size 64",
        "fine-tuning": "--epochs 1 --mixup 0.8 --cutmix 1 --model_ema --clip_grad 1 --total_batch_size 64",
    }
    for name, flags in evaluations.items():
        data = "--data_path photos --train_images 136 --eval_images 68 --num_workers 2"
        where = ["--finetune", str(work / "pretrained"), "--output_dir", str(work / name.replace(" ", "_"))]
        argv = [*where, *data.split(), *flags.split()]
        status, line = _last_words(lambda argv=argv: cli.main_finetune(argv))
        # On a null GPU no image is ever counted as evaluated.
        report.check(name, not status or report.dry_run, line)


def _last_words(command: Callable[[], None]) -> tuple[int, str]:
    """Exit status of a command, and the last line of what it complained about."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            command()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "", file=errors)
    lines = errors.getvalue().strip().splitlines()
    return status, lines[-1] if lines else ""

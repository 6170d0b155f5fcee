"""Steps of gpu_acceptance.py that time: the machine, steps of pretraining, ViTMAE beside them, loaders, attention."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mae_et  # noqa: F401, before torch: it sets how OpenMP threads wait

# isort: split
import loader as loaders
import step as rivals
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from gpu_acceptance import Report
from gpu_correct import pretrain, start_run
from synthetic import LEARNING_RATE, loader_output
from torch.nn.attention import SDPBackend, sdpa_kernel

from mae_et.engine import runtime
from mae_et.engine.meters import EnergyMeter
from mae_et.engine.pretrain import PretrainRun, warm_up
from mae_et.engine.step import take_step
from mae_et.plan.curriculum import Curriculum

PEAK_FLOPS = 989e12
"""Of an H100 SXM in bf16, dense: what MFU is a share of."""
#: (width of a head, heads, tokens): ViT-B's encoder at three sizes and unmasked, MAE's decoder at three sizes.
ATTENTION = ((64, 12, 10), (64, 12, 26), (64, 12, 50), (64, 12, 197), (32, 16, 37), (32, 16, 101), (32, 16, 197))


def milliseconds(call: Callable[[], Any], times: int = 8, warm: int = 3) -> tuple[float, float]:
    """Medians of a call: on the GPU, by events, and of the host until it has asked for everything."""
    for _ in range(warm):
        call()
    gpu, host = [], []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        began = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - began))
        end.record()
        end.synchronize()
        gpu.append(begin.elapsed_time(end))
    return statistics.median(gpu), statistics.median(host)


def env(report: Report, work: Path) -> None:
    """What this machine is, and what it can do at best."""
    packages = {package.__name__: package.__version__ for package in (torch, torchvision, timm, transformers)}
    cudnn = None if report.dry_run else torch.backends.cudnn.version()
    cuda = {"cuda": torch.version.cuda, "cudnn": cudnn, "nccl": torch.cuda.nccl.version()}
    report.note("versions", packages | cuda | {"python": sys.version.split()[0]})
    device, shm = torch.cuda.get_device_properties(0), os.statvfs("/dev/shm")
    machine = {"name": device.name, "GiB": device.total_memory / 2**30, "processors": device.multi_processor_count}
    machine |= {"cores": len(os.sched_getaffinity(0)), "/dev/shm GiB": shm.f_blocks * shm.f_frsize / 2**30}
    report.note("machine", machine)
    choices = {}
    for width, heads, tokens in ATTENTION:
        for dtype in (torch.bfloat16, torch.float32):
            q = torch.zeros(64, heads, tokens, width, device="cuda", dtype=dtype, requires_grad=True)
            choices[f"{heads}×{width}, {tokens} tokens, {dtype}"] = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    report.note("attention that torch chooses", choices)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    report.note("matrix product in bf16, TFLOP/s", 2 * 8192**3 / milliseconds(lambda: a @ b)[0] / 1e9)
    one, other = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    report.note("copy on the device, TB/s", 2 * 2**30 / milliseconds(lambda: other.copy_(one))[0] / 1e9)
    pinned = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    copy = milliseconds(lambda: one[: 2**28].copy_(pinned, non_blocking=True))[0]
    report.note("copy from pinned memory, GB/s", 2**28 / copy / 1e6)
    for place in ("cuda", "cpu"):
        x, began = torch.ones(8, device=place), time.perf_counter()
        for _ in range(5000):
            x.add_(1)
        report.note(f"smallest operator on {place}, host µs", 200 * (time.perf_counter() - began))
        torch.cuda.synchronize()
    meter = EnergyMeter(torch.device("cuda", 0))
    time.sleep(0.2)
    report.note("energy of 0.2 s idle, J (0: nothing tells)", meter.since())


def speed(report: Report, work: Path) -> None:
    """Whole steps of ViT-B: eager and compiled, with and without graphs, 512 and 64 images, in each stage."""
    model = "--recipe in1k_vitb_etpp400_hog" + (" --model mae_vit_tiny_patch16" if report.dry_run else "")
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for images in (512, 64):
        for mode in ("", "--cuda_graphs on", "--compile", "--compile --cuda_graphs on"):
            if report.dry_run and "--compile" in mode:
                continue
            flags = mode if "on" in mode else f"{mode} --cuda_graphs off"
            gc.collect()  # the last run, with its graphs' memory
            torch.cuda.empty_cache()
            with runtime.start("cuda", "bf16") as rt:
                with torch.device(rt.device):  # weights are drawn there, at once
                    run = start_run(f"{model} {flags} --batch_size {images} --total_batch_size {images}", rt)
                began = time.perf_counter()
                warm_up(run)
                report.note(f"warm-up, {mode or 'eager'}, {images} images, s", time.perf_counter() - began)
                stages = range(len(run.curriculum.stages))
                rows[mode, images] = found = [_timed(report, run, index, mode) for index in stages]
            ratio = seconds_over_vanilla(run.curriculum, [row["gpu_ms"] for row in found])
            report.note(f"seconds over vanilla's at equal FLOPs, {mode or 'eager'}, {images} images", ratio)
            if mode == "--compile --cuda_graphs on" and images == 512:
                report.below("seconds over vanilla's at equal FLOPs, 512 images", ratio, 1.1)
                report.at_least("MFU at 224 px", found[-1]["mfu"], 0.3)
                report.at_least("MFU at 96 px", found[0]["mfu"], 0.25)
    eager, graphs = (rows[mode, 64][0]["gpu_ms"] for mode in ("", "--cuda_graphs on"))
    report.at_least("graphs over eager, 64 images of 96 px", eager / graphs, 1.5)
    report.below("host ms of a step as a graph, 64 images of 96 px", rows["--cuda_graphs on", 64][0]["host_ms"], 3)


def _timed(report: Report, run: PretrainRun, index: int, mode: str) -> dict[str, Any]:
    """Milliseconds, MFU and memory of steps in a stage."""
    torch.cuda.reset_peak_memory_stats()
    stage = run.curriculum.stages[index]
    batches = loader_output(run, stage)
    gpu, host = milliseconds(lambda: take_step(run, iter(batches), stage, LEARNING_RATE))
    row = {
        "gpu_ms": gpu,
        "host_ms": host,
        "images_per_second": 1e3 * stage.batch_size / gpu,
        "mfu": 1e3 * stage.flops_per_step / gpu / PEAK_FLOPS,
        # What a graph needs shows only while it is captured, before the first step.
        "peak_GiB": max(torch.cuda.max_memory_allocated(), run.ledger.stages[index].peak_memory_bytes) / 2**30,
        "reserved_GiB": torch.cuda.max_memory_reserved() / 2**30,
    }
    report.note(f"{stage.batch_size} images of {stage.size_px} px, {mode or 'eager'}", row)
    return row


def seconds_over_vanilla(curriculum: Curriculum, ms: list[float]) -> float:
    """Time of the curriculum over that of the same FLOPs all at full size, with steps that take `ms` in each stage."""
    stages, full = curriculum.stages, curriculum.stages[-1]
    ours = sum(stage.steps * taken for stage, taken in zip(stages, ms, strict=True))
    return ours / (curriculum.total_flops / full.flops_per_step * ms[-1])


def rival(report: Report, work: Path) -> None:
    """transformers' ViTMAE in bf16, in the same process: same images, same work, steps in turn."""
    for compiled in (False,) if report.dry_run else (False, True):
        model = "mae_vit_tiny_patch16" if report.dry_run else "mae_vit_base_patch16"
        options = rivals.StepConfig(models=(model,), device="cuda", batch_size=128, compile=compiled)
        with runtime.start("cuda", "bf16") as rt:
            run = rivals.synthetic_run(rivals.pretrain_config(options, model), rt, rivals.NUM_IMAGES)
            warm_up(run)
            for stage in (run.curriculum.stages[0], run.curriculum.stages[-1]):
                ours = rivals.Contestant(run, stage)
                theirs = rivals.Contestant(run, stage, rivals.vit_mae(run, stage))
                ours.warm_up(), theirs.warm_up()
                pairs = [(ours.step(), theirs.step()) for _ in range(8)]
                ratio = statistics.median(their / our for our, their in pairs)
                name = f"{'compiled' if compiled else 'eager'}, {stage.batch_size} images of {stage.size_px} px"
                rates = [stage.batch_size / statistics.median(seconds) for seconds in zip(*pairs, strict=True)]
                report.note(f"images/s of ours and of ViTMAE, {name}", rates)
                report.at_least(f"× ViTMAE, {name}", ratio, 1.5 if compiled else 1.0)


def loader(report: Report, work: Path) -> None:
    """main_pretrain.py on JPEG files in memory: ViT-B, all stages, what it waits for data."""
    folder = Path("/dev/shm") / f"mae_et_jpegs_{os.getuid()}" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    photographs, count = loaders.photographs(), 200 if report.dry_run else 4000
    for i in range(count):
        (folder / f"{i:05}.jpg").write_bytes(photographs[i % len(photographs)])
    batches = "--batch_size 512 --total_batch_size 1024 --epochs 12 --compile"
    if report.dry_run:
        batches = "--model mae_vit_tiny_patch16 --batch_size 16 --total_batch_size 32 --epochs 0.5"
    names = "size_px images train_seconds data_seconds warmup_seconds energy_joules peak_memory_bytes".split()
    for lowfreq in ("scaled",) if report.dry_run else ("scaled", "fourier"):
        flags = f"--recipe in1k_vitb_etpp400_hog --data_path {folder.parent} --lowfreq {lowfreq} --warmup_epochs 0"
        workers = max(1, len(os.sched_getaffinity(0)) - 1)
        pretrain(f"{flags} {batches} --num_workers {workers}", work / f"loader_{lowfreq}")
        ledger = json.loads((work / f"loader_{lowfreq}" / "ledger.json").read_text())
        report.note(f"{lowfreq}, {workers} workers", [{name: row[name] for name in names} for row in ledger["stages"]])
        total = ledger["total"]
        wait = total["data_seconds"] / (total["data_seconds"] + total["train_seconds"])
        if lowfreq == "scaled":
            report.below("data wait with scaled", wait, 0.05)
        else:
            report.note(f"data wait with {lowfreq}", wait)


def attention(report: Report, work: Path) -> None:
    """Forward and backward of attention, and its first call, by backend and shape, of 512 images."""
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    for width, heads, tokens in ATTENTION:
        row = {}
        for backend in backends if report.dry_run else (*backends, SDPBackend.CUDNN_ATTENTION):
            shape = {"device": "cuda", "dtype": torch.bfloat16}
            packed = torch.randn(512, tokens, 3, heads, width, requires_grad=True, **shape)
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            gradient = torch.randn(512, heads, tokens, width, **shape)

            def both(q=q, k=k, v=v, gradient=gradient) -> None:
                F.scaled_dot_product_attention(q, k, v).backward(gradient, retain_graph=True)

            try:
                with sdpa_kernel(backend):
                    began = time.perf_counter()
                    both()
                    torch.cuda.synchronize()
                    first = time.perf_counter() - began
                    row[backend.name] = {"ms": milliseconds(both)[0], "first_s": first}
            except RuntimeError as error:
                row[backend.name] = str(error)[:100]
        report.note(f"{heads} heads of {width}, {tokens} tokens", row)

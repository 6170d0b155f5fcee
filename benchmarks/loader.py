"""Images per second and core of this loader, against the two pipelines it replaces, alternating in one process.

    python benchmarks/loader.py [--sizes 96 160 224] [--rounds 7] [--json FILE]

(a) MAE's pretraining transform at 224 (torchvision: random resized crop, bicubic, flip, ToTensor, Normalize);
(b) EfficientTrain's at size B: the same crop and flip at 224, then Lanczos to B, ToTensor, Normalize.

Ours are the operators of --lowfreq; `prepared` is `scaled` on the same images after `mae_et prepare --short_side 256`,
`2 views` is `scaled` with two crops of each decoded image.

All read the same JPEGs from memory: 500×375, quality 90, cut from the photographs in scikit-image and scikit-learn. One
process on one core; its processor time is what is counted, so that other load disturbs less. Every round times each
pipeline once, on the same images and with new crops; a ratio is of two times of one round.

    python benchmarks/loader.py --trainer [--workers 2]

What the loader costs the process that trains, with workers that have nothing to do: processor time of the thread that
launches the steps, and of the one that puts micro-batches together, an image; and of a rank's mask noise, a step.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

from mae_et.data.config import PrepareConfig
from mae_et.data.decode import train_crop, train_crops
from mae_et.data.loader import CorruptLog, train_batches
from mae_et.data.photos import CLASSES, photograph
from mae_et.data.prepare import Encoder
from mae_et.data.stream import Samples, SampleStream, mask_noise, rank_rows
from mae_et.data.workers import Loading
from mae_et.plan.curriculum import Curriculum, Stage
from mae_et.plan.shared import IMAGENET_MEAN, IMAGENET_STD

FULL_PX = 224
CROP_SCALE = (0.2, 1.0)
IMAGE_PX = 500, 375  # width, height: a typical image of ImageNet
TARGETS = {(96, "b"): 4.5, (96, "a"): 3.0, (160, "b"): 2.0, (224, "a"): 1.3}
"""Ratios asked for of the operator `scaled`: (size, pipeline) -> at least."""


def photographs() -> list[bytes]:
    """Every photograph as JPEGs of 500×375 pixels, quality 90: the whole, and its left and right halves."""
    images = []
    for name in CLASSES:
        whole = Image.fromarray(photograph(name)).convert("RGB")
        for left, right in ((0, 1), (0, 0.5), (0.5, 1)):
            buffer = io.BytesIO()
            part = whole.resize(
                IMAGE_PX, Image.Resampling.LANCZOS, (left * whole.width, 0, right * whole.width, whole.height)
            )
            part.save(buffer, "JPEG", quality=90)
            images.append(buffer.getvalue())
    return images


def torchvision_pipeline(size_px: int) -> Callable[[bytes, int], torch.Tensor]:
    """Pipeline (a) where size_px is 224, else (b). Normalised float32 [3, B, B]."""
    crop = transforms.RandomResizedCrop(FULL_PX, scale=CROP_SCALE, interpolation=transforms.InterpolationMode.BICUBIC)
    shrink = [] if size_px == FULL_PX else [transforms.Resize(size_px, transforms.InterpolationMode.LANCZOS)]
    finish = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *shrink, *finish])

    def run(data: bytes, seed: int) -> torch.Tensor:
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    return run


def our_pipeline(size_px: int, operator: str) -> Callable[[bytes, int], torch.Tensor]:
    """What a loader process does for one sample: uint8 [3, B, B], or [3, 224, 224] for `fourier`."""

    def run(data: bytes, seed: int) -> torch.Tensor:
        return train_crop(data, (size_px, size_px), (FULL_PX, FULL_PX), operator, CROP_SCALE, 0, seed, 3)

    return run


def two_views(size_px: int) -> Callable[[bytes, int], list[torch.Tensor]]:
    """`scaled` with --views_per_image 2."""

    def run(data: bytes, seed: int) -> list[torch.Tensor]:
        seeds = [2 * seed, 2 * seed + 1]
        return train_crops(data, (size_px, size_px), (FULL_PX, FULL_PX), "scaled", CROP_SCALE, 0, seeds, 3)

    return run


def prepared(images: list[bytes]) -> list[bytes]:
    """What `mae_et prepare` with its own settings makes of them."""
    encoder = Encoder(Memory(images), PrepareConfig("images", "out"))
    return [encoder[i][0] for i in range(len(images))]


class Memory:
    """An unlabelled source of bytes."""

    def __init__(self, images: list[bytes]) -> None:
        self.classes = self.labels = None
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[bytes, None]:
        return self.images[index], None

    def name(self, index: int) -> str:
        return f"images[{index}]"


def cpu_seconds(run: Callable[[bytes, int], torch.Tensor], images: list[bytes], round_number: int) -> float:
    began = time.process_time()
    for i, data in enumerate(images):
        run(data, round_number * len(images) + i)
    return time.process_time() - began


class Blank(torch.utils.data.Dataset):
    """One image for every sample, without reading or decoding."""

    def __init__(self, size_px: int) -> None:
        self.image = torch.zeros(3, size_px, size_px, dtype=torch.uint8)
        self.image_bytes = self.image.numel()

    def __getitems__(self, samples: Samples) -> list[tuple[list[torch.Tensor], list]]:
        return [([self.image], [])] * len(samples)


def trainer_cost(size_px: int, micro_size: int, workers: int, replay: int) -> tuple[float, float]:
    """(launching thread, loader's thread): microseconds of processor time an image, in the middle of an epoch."""
    batches = 2 + 20_000 // micro_size
    depth = 8 if replay > 1 else 1
    stage = Stage(size_px, 9, 27, micro_size, 1100 + batches, 1.0, replay=replay, replay_depth=depth)
    stream = SampleStream(Curriculum((stage,), 1_281_167), 0, micro_size, first_step=1000)
    made = train_batches(Blank(size_px), stream, CorruptLog(1, 0.0), Loading(workers, on_gpu=True))
    for _ in range(8):  # the permutation of the epoch, and the first chunks
        next(made)
    process, thread = time.process_time(), time.thread_time()
    for _ in range(batches):
        next(made)
    launching = time.thread_time() - thread
    others = time.process_time() - process - launching
    made.close()
    return 1e6 * launching / (batches * micro_size), 1e6 * others / (batches * micro_size)


def noise_milliseconds(batch: int, patches: int, ranks: int) -> float:
    """Median processor time of rank 0's mask noise of a step."""
    times = []
    for step in range(12):
        began = time.thread_time()
        mask_noise(0, step, rank_rows(batch, 0, ranks), patches)
        times.append(time.thread_time() - began)
    return 1e3 * statistics.median(times[2:])


def print_trainer_costs(workers: int) -> None:
    print(f"{'images':28} {'launching thread':>18} {'loader thread':>16}   µs an image")
    for size, micro, replay in ((96, 512, 1), (224, 512, 1), (96, 512, 4)):
        launching, making = trainer_cost(size, micro, workers, replay)
        name = f"{size} px, micro-batch {micro}{', replay' if replay > 1 else ''}"
        print(f"{name:28} {launching:18.2f} {making:16.2f}")
    print(
        f"\n{'rows of a step':16} {'patches':>8} {'1 rank':>8} {'8 ranks':>8} {'64 ranks':>9}   ms of noise on rank 0"
    )
    for batch in (4096, 16384):
        for patches in (36, 100, 196):
            times = [noise_milliseconds(batch, patches, ranks) for ranks in (1, 8, 64)]
            print(f"{batch:<16} {patches:8} {times[0]:8.2f} {times[1]:8.2f} {times[2]:9.2f}")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 160, 224])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--trainer", action="store_true", help="what the loader costs the process that trains")
    parser.add_argument("--workers", type=int, default=2, help="of --trainer")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    if arguments.trainer:
        print_trainer_costs(arguments.workers)
        return

    images = photographs()
    pipelines = {("a", FULL_PX): torchvision_pipeline(FULL_PX)}
    for size in arguments.sizes:
        pipelines |= {(name, size): our_pipeline(size, name) for name in ("scaled", "lanczos", "fourier")}
        pipelines["prepared", size] = our_pipeline(size, "scaled")
        pipelines["2 views", size] = two_views(size)
        if size != FULL_PX:
            pipelines["b", size] = torchvision_pipeline(size)
    smaller = prepared(images)
    for run in pipelines.values():
        cpu_seconds(run, images[:5], 0)  # imports, caches
    seconds = {key: [] for key in pipelines}
    for number in range(arguments.rounds):
        for key, run in pipelines.items():
            spent = cpu_seconds(run, smaller if key[0] == "prepared" else images, number)
            seconds[key].append(spent / 2 if key[0] == "2 views" else spent)

    rates = {key: [len(images) / s for s in times] for key, times in seconds.items()}
    kilobytes = statistics.mean(map(len, images)) / 1000
    print(
        f"{len(images)} JPEGs of {IMAGE_PX[0]}×{IMAGE_PX[1]}, {kilobytes:.0f} kB on average; {arguments.rounds} rounds"
    )
    print(f"{'size':>4} {'pipeline':10} {'images/s per core':24} {'× (a) at 224':22} {'× (b)':22} asked")
    report = []
    for (name, size), rate in rates.items():
        row = {"size_px": size, "pipeline": name, "images_per_second": spread(rate)}
        asked = []
        for other, key in (("a", ("a", FULL_PX)), ("b", ("b", size))):
            if key in rates and key != (name, size):
                row[f"ratio_{other}"] = spread([x / y for x, y in zip(rate, rates[key], strict=True)])
                if name == "scaled" and (target := TARGETS.get((size, other))):
                    met = row[f"ratio_{other}"]["median"] >= target
                    asked.append(f"({other}) ≥ {target:g}: {'met' if met else 'missed'}")
        report.append(row)
        cells = [
            f"{row[c]['median']:.{digits}f} ({row[c]['min']:.{digits}f}–{row[c]['max']:.{digits}f})" if c in row else ""
            for c, digits in (("images_per_second", 0), ("ratio_a", 2), ("ratio_b", 2))
        ]
        print(f"{size:4} {name:10} {cells[0]:24} {cells[1]:22} {cells[2]:22} {', '.join(asked)}")
    if arguments.json:
        facts = {"images": len(images), "rounds": arguments.rounds, "torch": torch.__version__, "results": report}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

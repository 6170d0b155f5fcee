"""Which image at which step is a function of (seed, step): not of ranks, micro-batches, workers or restarts."""

from __future__ import annotations

import io
import logging
import multiprocessing
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_et.data import loader
from mae_et.data.decode import train_crop
from mae_et.data.loader import CorruptLog, TrainImages, _all_over, first_readable, train_batches
from mae_et.data.pixels import to_image
from mae_et.data.replay import MissingSamples
from mae_et.data.sources import open_source
from mae_et.data.stream import (
    Sample,
    SampleStream,
    derive_seed,
    image_index,
    mask_noise,
    micro_batches,
    rank_rows,
    samples_at,
)
from mae_et.data.workers import Loading, ahead, default_workers, in_flight
from mae_et.plan.curriculum import Curriculum, Stage

FEW = settings(max_examples=30)


def curriculum(num_images: int, *stages: tuple[int, int], size_px: int = 16) -> Curriculum:
    """Stages given as (batch size, steps), of growing size."""
    planned = [Stage(size_px + 8 * i, 4, 12, batch, steps, 1.0) for i, (batch, steps) in enumerate(stages)]
    return Curriculum(tuple(planned), num_images)


def samples_by_step(plan: Curriculum, seed=0, micro_size=10**9, first_step=0, world_size=1) -> list[list]:
    """Every step's samples: the rows of rank 0, then those of rank 1, and so on."""
    steps = [[] for _ in range(first_step, plan.total_steps)]
    for rank in range(world_size):
        stream = iter(SampleStream(plan, seed, micro_size, first_step, rank, world_size))
        for step in range(first_step, plan.total_steps):
            for rows in micro_batches(
                plan.at(step).batch_size, micro_size, rank, world_size, plan.at(step).rows_per_image
            ):
                micro = next(stream)
                assert len(micro) == len(rows) <= micro_size
                steps[step - first_step] += micro
        assert next(stream, None) is None
    return steps


def image_at(seed: int, number: int, num_images: int) -> int:
    """The image that is sample `number`, computed on its own."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", number // num_images))
    return torch.randperm(num_images, generator=generator)[number % num_images].item()


def sample_at(plan: Curriculum, seed: int, step: int, row: int) -> Sample:
    """The sample of one row, in whole numbers of Python, image by image."""
    number = plan.index(step)
    stage, step_in_stage = plan.stages[number], step - plan.start(number)
    group, view = divmod(row // stage.masks_per_image, stage.views_per_image)
    cycle, turn = divmod(step_in_stage + group % stage.replay, stage.replay)
    if turn:
        cycle -= turn * (stage.replay_depth - 1) // (stage.replay - 1) % (cycle + 1)
    fresh_at = max(0, cycle * stage.replay - group % stage.replay)
    image = plan.decoded_before(plan.start(number)) + stage.decoded_before(fresh_at)
    image += group // stage.replay if fresh_at else group
    slot = (group * stage.views_per_image + view) * stage.replay_depth + cycle % stage.replay_depth
    index = image_at(seed, image, plan.num_images)
    return Sample(index, image * stage.views_per_image + view, number, slot)


# ------------------------------------------------------------------------------------------------------------- order


@FEW
@given(num_images=st.integers(1, 60), batch=st.integers(1, 25), seed=st.integers(0, 9))
def test_every_image_comes_once_per_epoch(num_images, batch, seed):
    plan = curriculum(num_images, (batch, 1 + num_images // batch), (2 * batch, 1 + num_images // batch))
    samples = [sample for step in samples_by_step(plan, seed) for sample in step]
    assert [sample.number for sample in samples] == list(range(plan.total_images))
    for epoch in range(len(samples) // num_images):
        indices = [sample.index for sample in samples[epoch * num_images : (epoch + 1) * num_images]]
        assert sorted(indices) == list(range(num_images))
    assert [s.index for s in samples] == [image_at(seed, s.number, num_images) for s in samples]
    assert {s.stage for s in samples[: plan.stages[0].images]} == {0}
    assert {s.stage for s in samples[plan.stages[0].images :]} == {1}


def test_epochs_and_seeds_have_orders_of_their_own():
    numbers = np.arange(50)
    orders = {tuple(image_index(seed, epoch * 50 + numbers, 50)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert tuple(range(50)) not in orders


@FEW
@given(data=st.data(), world_size=st.integers(1, 7), micro_size=st.integers(1, 30), seed=st.integers(0, 99))
def test_order_depends_on_neither_ranks_nor_micro_batches_nor_restarts(data, world_size, micro_size, seed):
    stages = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=3))
    plan = curriculum(data.draw(st.integers(1, 50)), *stages)
    first_step = data.draw(st.integers(0, plan.total_steps))
    whole = samples_by_step(plan, seed)
    assert samples_by_step(plan, seed, micro_size, first_step, world_size) == whole[first_step:]


@FEW
@given(batch=st.integers(1, 200), world_size=st.integers(1, 16), micro_size=st.integers(1, 64))
def test_ranks_share_a_batch_evenly(batch, world_size, micro_size):
    shares = [rank_rows(batch, rank, world_size) for rank in range(world_size)]
    assert [row for share in shares for row in share] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank, share in enumerate(shares):
        micro = micro_batches(batch, micro_size, rank, world_size)
        assert [row for rows in micro for row in rows] == list(share)
        assert all(0 < len(rows) <= micro_size for rows in micro)


@FEW
@given(
    data=st.data(), world_size=st.integers(1, 8), group=st.sampled_from((1, 1, 2, 6)), micro_size=st.integers(1, 300)
)
def test_micro_batches_are_of_one_size_where_one_divides_the_share(data, world_size, group, micro_size):
    groups = data.draw(st.integers(1, 400) | st.sampled_from((64, 256, 448, 1000, 1024)))
    batch = groups * group * world_size + data.draw(st.sampled_from((0, 0, 0, 1)))
    fits = max(micro_size, group)  # rows of one image are never torn apart
    counts = set()
    for rank in range(world_size):
        share = rank_rows(batch, rank, world_size)
        sizes = [len(rows) for rows in micro_batches(batch, micro_size, rank, world_size, group)]
        assert sum(sizes) == len(share) and max(sizes) <= fits
        assert max(sizes) - min(sizes) <= group
        fewest = -(-len(share) // (fits // group * group))
        assert fewest <= len(sizes) <= 2 * fewest
        counts.add(len(sizes))
        alike = [size for size in range(fits, 0, -1) if size % group == len(share) % size == 0]
        alike = [size for size in alike if len(share) <= 2 * fewest * size]
        if alike and batch % world_size == 0:
            assert {*sizes} == {next((size for size in alike if size % 64 == 0), alike[0])}
    assert len(counts) == 1 or batch % world_size


def test_micro_batches_prefer_multiples_of_64():
    def sizes(batch, micro_size):
        return [len(rows) for rows in micro_batches(batch, micro_size, 0, 1)]

    assert sizes(4096, 1003) == [512] * 8  # a ViT-B's at 160 px, where 512 fit at 224 px
    assert sizes(4096, 348) == [256] * 16
    assert sizes(960, 500) == [320] * 3  # not 480
    assert sizes(1000, 300) == [250] * 4
    assert sizes(4099, 1003) == [819, 820, 820, 820, 820]  # a prime number: as even as can be


def philox(key: int, block: int) -> list[int]:
    """The 4 × 64 bits of block number `block` of Philox4x64-10, after Salmon et al., SC 2011."""
    word = 2**64 - 1
    a, b, c, d = block + 1, 0, 0, 0  # NumPy counts before it draws
    low, high = key & word, key >> 64
    for _ in range(10):
        left, right = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = right >> 64 ^ b ^ low, right & word, left >> 64 ^ d ^ high, left & word
        low, high = low + 0x9E3779B97F4A7C15 & word, high + 0xBB67AE8584CAA73B & word
    return [a, b, c, d]


@FEW
@given(first=st.integers(0, 70_000), rows=st.integers(0, 9), patches=st.integers(1, 50), seed=st.integers(0, 9))
def test_mask_noise_of_some_rows_is_a_part_of_the_same_numbers(first, rows, patches, seed):
    """Whoever draws them: the k-th number of a step is the upper 24 of 32 bits of Philox, with a key of the step."""
    noise = mask_noise(seed, 7, range(first, first + rows), patches)
    key, numbers = derive_seed(seed, "mask", 7), range(first * patches, (first + rows) * patches)
    wanted = [(philox(key, k // 8)[k % 8 // 2] >> 32 * (k % 2) & 0xFFFFFFFF) >> 8 for k in numbers]
    assert (noise.flatten() * 2**24).tolist() == wanted and noise.shape == (rows, patches)


def test_mask_noise_is_uniform_and_differs_by_step_and_seed():
    noise = mask_noise(seed=3, step=5, rows=range(10), patches=36)
    assert 0 <= noise.min() < 0.05 < 0.95 < noise.max() < 1
    assert len(noise.flatten().unique()) > 350
    torch.rand(7), np.random.rand(7)  # global generators have no part in it
    assert mask_noise(3, 5, range(10), 36).equal(noise)
    assert not mask_noise(3, 6, range(10), 36).equal(noise)
    assert not mask_noise(4, 5, range(10), 36).equal(noise)


def test_seeds_are_independent_by_purpose():
    purposes = [
        (0, "order", 1),
        (0, "mask", 1),
        (0, "augment", 1),
        (1, "order", 1),
        (0, "order", 11),
        (0, "order", 1, 1),
    ]
    seeds = {derive_seed(*purpose) for purpose in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "order", 1) == derive_seed(0, "order", 1)


# ------------------------------------------------------------------------------------------------------------ loader


class Noise:
    """A source of random pictures; those in `damaged` can't be decoded, those in `gone` can't be read."""

    def __init__(self, num_images: int, damaged: tuple[int, ...] = (), gone: tuple[int, ...] = ()) -> None:
        self.num_images, self.damaged, self.gone = num_images, damaged, gone

    def __len__(self) -> int:
        return self.num_images

    def read(self, index: int) -> tuple[np.ndarray | bytes, None]:
        if index in self.gone:
            raise OSError(f"no file {index}")
        if index in self.damaged:
            return b"neither JPEG nor PNG", None
        return np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8), None

    def name(self, index: int) -> str:
        return f"noise/{index}.png"


def batches(source: Noise, plan: Curriculum, operator="lanczos", limit=0.5, workers=0, **stream) -> list[torch.Tensor]:
    dataset = TrainImages(source, plan, 32, operator, in_chans=3, seed=7)
    stream = SampleStream(plan, 7, **{"micro_size": 3} | stream)
    return list(train_batches(dataset, stream, CorruptLog(len(source), limit), Loading(workers, on_gpu=True)))


def alone(source: Noise, index: int, number: int, stage: Stage, operator="lanczos") -> torch.Tensor:
    """One crop, made without the loader."""
    size, seed = stage.height_width, derive_seed(7, "augment", number)
    return train_crop(source.read(index)[0], size, (32, 32), operator, stage.crop_scale, stage.augment, seed, 3)


@pytest.fixture
def chunks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers hand over two images at a time, so that micro-batches are of several chunks, the last one smaller."""
    monkeypatch.setattr(loader, "CHUNK_IMAGES", 2)
    monkeypatch.setattr(loader, "in_flight", lambda num_workers, image_bytes, most_images: (2, 2))


@pytest.mark.usefixtures("chunks_of_two")
def test_batches_do_not_depend_on_the_number_of_workers():
    source, plan = Noise(11, damaged=(4,)), curriculum(11, (5, 3), (7, 2))
    wanted = batches(source, plan)
    assert [tuple(batch.shape) for batch in wanted] == [(2, 3, 16, 16), (3, 3, 16, 16)] * 3 + [
        (2, 3, 24, 24),
        (2, 3, 24, 24),
        (3, 3, 24, 24),
    ] * 2
    assert {batch.dtype for batch in wanted} == {torch.uint8}
    for workers in (1, 2, 4):
        found = batches(source, plan, workers=workers)
        assert len(found) == len(wanted)
        assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("operator", ["fourier", "lanczos"])
def test_a_restart_on_other_ranks_goes_on_with_the_same_images(operator):
    source, plan = Noise(9), curriculum(9, (6, 2), (4, 3))
    whole = batches(source, plan, operator, micro_size=100)
    ranks = [batches(source, plan, operator, micro_size=100, first_step=1, rank=r, world_size=2) for r in (0, 1)]
    assert len(whole) == 5
    for step, shares in enumerate(zip(*ranks, strict=True), start=1):
        assert torch.cat(shares).equal(whole[step])
    for step, numbers in ((0, range(6)), (2, range(12, 16))):
        images = [alone(source, image_at(7, g, 9), g, plan.at(step), operator) for g in numbers]
        assert torch.stack(images).equal(whole[step])


def test_a_damaged_image_is_replaced_by_another_one_that_can_be_read(caplog):
    source, plan = Noise(10, damaged=(3, 9), gone=(0,)), curriculum(10, (10, 3))
    replaced = {3: 7, 0: 7, 9: 6}  # 3, 0 and 7 are 7 apart
    with caplog.at_level(logging.WARNING, logger="mae_et.data.loader"):
        found = torch.cat(batches(source, plan))
    counted = [record.getMessage() for record in caplog.records if "damaged image skipped" in record.getMessage()]
    for number, image in enumerate(found):
        index = image_at(7, number, 10)
        # The replacement takes the sample's own augmentation, so it depends on nothing but the sample.
        assert image.equal(alone(source, replaced.get(index, index), number, plan.stages[0]))
    assert torch.cat(batches(source, plan, workers=2)).equal(found)

    assert len(counted) == 3  # each named once
    for name in ("noise/3.png", "noise/0.png: no file 0", "noise/9.png"):
        assert any(name in message for message in counted)
    assert "(3 so far)" in counted[2]


def test_damage_below_the_limit_goes_on_and_above_it_stops(caplog):
    plan = curriculum(10, (10, 2))
    assert len(batches(Noise(10, damaged=(3, 4)), plan, limit=0.2)) == 10  # five micro-batches of two, twice
    for workers in (0, 1):
        with pytest.raises(
            ValueError, match=r"3 of 10 images are damaged, more than --damaged_limit 0\.2; .*noise/\d"
        ) as error:
            batches(Noise(10, damaged=(3, 4, 8)), plan, limit=0.2, workers=workers)
        assert "--data_path" in str(error.value)
        assert "\n" not in str(error.value)
    assert len(batches(Noise(10), plan, limit=0.0)) == 10
    with pytest.raises(ValueError, match=r"1 of 10 images are damaged, more than --damaged_limit 0;"):
        batches(Noise(10, damaged=(3,)), plan, limit=0.0)


def test_the_limit_counts_images_not_sightings():
    damage = CorruptLog(num_images=100, limit=0.02)
    for _ in range(5):
        damage.add([(1, "a", "broken"), (2, "b", "broken")])
    with pytest.raises(ValueError, match=r"3 of 100 images .* the last is c: cut short"):
        damage.add([(1, "a", "broken"), (3, "c", "cut short")])


class Reads(Noise):
    """Counts what has been read, by whatever process."""

    def __init__(self, num_images: int) -> None:
        super().__init__(num_images)
        self.reads = torch.zeros(1, dtype=torch.int64).share_memory_()

    def read(self, index: int) -> tuple[np.ndarray, None]:
        self.reads += 1
        return super().read(index)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.usefixtures("chunks_of_two")
def test_what_is_made_ahead_is_bounded_and_nothing_outlives_the_loader():
    earlier = set(multiprocessing.active_children())  # of tests whose loaders have not ended yet
    source, plan = Reads(1000), curriculum(1000, (4, 250))
    images = TrainImages(source, plan, 32, "lanczos", in_chans=3, seed=7)
    made = train_batches(images, SampleStream(plan, 7, 4), CorruptLog(1000, 0.0), Loading(1, on_gpu=True))
    for _ in range(3):
        next(made)
    seen, deadline = 0, time.monotonic() + 30
    while (now := source.reads.item()) != seen and time.monotonic() < deadline:  # until it no longer grows
        seen = now
        time.sleep(0.3)
    # Three micro-batches of 4 are taken, two wait, one is being put together, and two chunks of 2 are on their way.
    assert 12 <= seen <= 12 + 3 * 4 + 2 * 2
    (worker,) = set(multiprocessing.active_children()) - earlier
    assert len(loader_threads()) == 1
    made.close()
    assert not worker.is_alive() and not loader_threads()


def test_an_error_comes_up_where_its_batch_would_have_and_ends_the_thread():
    def batches():
        yield "first"
        yield "second"
        raise OSError("third")

    beside_gpu = Loading(1, on_gpu=True)
    made = ahead(batches(), beside_gpu)
    assert [next(made), next(made)] == ["first", "second"]
    with pytest.raises(OSError, match="third"):
        next(made)
    assert not loader_threads() and next(made, None) is None
    assert list(ahead((x for x in "abcde"), beside_gpu)) == list("abcde")


@FEW
@given(num_workers=st.integers(1, 200), side_px=st.integers(16, 600), free_mib=st.integers(1, 100_000))
def test_bytes_in_flight_are_bounded(num_workers, side_px, free_mib):
    image_bytes, free = 3 * side_px**2, free_mib * 2**20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mae_et.data.workers.shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        patch.setattr("mae_et.data.workers.SHARED_MEMORY", Path("/"))
        if num_workers * image_bytes > free:
            with pytest.raises(
                ValueError, match=r"--num_workers \d+: / has \d+ MiB free .*--shm-size=2g or --ipc=host"
            ):
                in_flight(num_workers, image_bytes, 128)
            return
        images, chunks = in_flight(num_workers, image_bytes, 128)
    assert 1 <= images <= 128 and 1 <= chunks <= 4
    bound = min(2**30, free // 2)
    assert num_workers * chunks * images * image_bytes <= max(bound, num_workers * image_bytes)
    if 2 * num_workers * 128 * image_bytes <= bound:
        assert images == 128 and chunks >= 2  # no smaller than it must be


def test_dockers_64_mb_are_enough_but_said(monkeypatch, caplog):
    monkeypatch.setattr("mae_et.data.workers.shutil.disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    monkeypatch.setattr("mae_et.data.workers.SHARED_MEMORY", Path("/"))
    assert in_flight(10, 3 * 224 * 224, 128) == (11, 2)
    (record,) = caplog.records
    assert "64 MiB free" in record.getMessage() and "--shm-size" in record.getMessage()


def test_beside_a_gpu_all_cores_but_one_decode(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(64), raising=False)
    assert (default_workers(), default_workers(on_gpu=True)) == (10, 63)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (default_workers(), default_workers(on_gpu=True)) == (8, 7)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere sources are pickled")
def test_workers_are_forked_whatever_the_system_does(monkeypatch):
    """As from Python 3.14 on; a class of a function can't be pickled."""

    class Local(Noise):
        pass

    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert len(batches(Local(4), curriculum(4, (2, 2)), workers=1)) == 2
    finally:
        multiprocessing.set_start_method(method, force=True)


def test_data_of_which_nothing_can_be_read_stop_the_run():
    with pytest.raises(
        ValueError, match=r"--data_path: 4 damaged images .* and none that can be used; the first is noise/\d.png"
    ):
        batches(Noise(4, damaged=(0, 1, 2, 3)), curriculum(4, (2, 1)), limit=0.9)


def test_a_broken_folder_stops_no_run_that_allows_for_it():
    """More of it than may be damaged in a row."""
    source, broken = Noise(1000, damaged=range(200, 600)), range(200, 600)
    used, tried = zip(*(first_readable(source, i, lambda item, *_: to_image(item, 3)) for i in broken), strict=True)
    assert max(map(len, tried)) <= 5
    assert len({image.tobytes() for image in used}) > 200, "a few images would be seen again and again"
    assert {len({*_all_over(3, count)}) for count in (1, 2, 7, 60, 100, 144, 1000)} == {1, 2, 7, 60, 100}


def test_jpegs_that_pillow_decodes_all_the_same_are_used_named_and_never_stop_the_run(caplog):
    """libjpeg warns of bytes that don't belong there, or are missing, and goes on; so does Pillow."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40), "teal").save(buffer, "JPEG")
    data = buffer.getvalue()

    class Holes(Noise):
        def read(self, index):
            return (data[:-2] + b"\x01" * (9 + index) + data[-2:] if index < 30 else data), None

    source, plan = Holes(40), curriculum(40, (20, 6))
    for workers in (0, 1):
        damage = CorruptLog(40, limit=0.0)
        images = TrainImages(source, plan, 32, "lanczos", in_chans=3, seed=7)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mae_et.data.loader"):
            assert len(list(train_batches(images, SampleStream(plan, 7, 20), damage, Loading(workers)))) == 6
        assert damage.decoded == set(range(30)) and not damage.seen
        named = [record.getMessage() for record in caplog.records if "decoded all the same" in record.getMessage()]
        assert len(named) == 20  # and then only every doubling: the 32nd, the 64th …
        assert "(1 so far): noise/" in named[0] and "Corrupt JPEG data" in named[0]


# ------------------------------------------------------------------------------------------------- replay and views


def replaying(num_images: int, *stages: tuple[int, int, int, int], views=1, masks=1) -> Curriculum:
    """Stages given as (batch size, steps, replay, depth), of growing size."""
    return Curriculum(
        tuple(
            Stage(
                16 + 8 * i,
                *(4, 12, batch, steps, 1.0),
                replay=replay,
                replay_depth=depth,
                views_per_image=views,
                masks_per_image=masks,
            )
            for i, (batch, steps, replay, depth) in enumerate(stages)
        ),
        num_images,
    )


@st.composite
def replay_plans(draw) -> Curriculum:
    views, masks = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    stages = [
        (
            views * masks * draw(st.integers(1, 9)),
            draw(st.integers(1, 12)),
            draw(st.integers(1, 4)),
            draw(st.integers(1, 4)),
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    return replaying(draw(st.integers(1, 30)), *stages, views=views, masks=masks)


@FEW
@given(plan=replay_plans(), data=st.data())
def test_rows_of_a_step_are_those_that_whole_numbers_give(plan, data):
    step = data.draw(st.integers(0, plan.total_steps - 1))
    rows = range(*sorted(data.draw(st.tuples(*[st.integers(0, plan.at(step).batch_size)] * 2))))
    assert list(samples_at(plan, 3, step, rows)) == [sample_at(plan, 3, step, row) for row in rows]


@FEW
@given(plan=replay_plans(), seed=st.integers(0, 9))
def test_images_are_decoded_in_order_and_counted(plan, seed):
    """What the buffer misses, step by step, is every image once per epoch, as many as the plan says, with all views."""
    stream = SampleStream(plan, seed, 10**9)
    decoded = []
    for step, missing in enumerate(MissingSamples(stream)):
        views = plan.at(step).views_per_image
        decoded += sorted({sample.number // views for sample in missing})
        assert len(missing) == views * len({sample.number // views for sample in missing})
        assert len(decoded) == plan.decoded_before(step + 1)
    assert decoded == list(range(plan.decoded_images))
    assert all(s.index == image_at(seed, s.number // plan.at(0).views_per_image, plan.num_images) for s in missing)


def test_a_step_takes_its_share_of_fresh_samples_and_a_stage_starts_anew():
    plan = replaying(100, (8, 20, 4, 3), (6, 7, 2, 2), (6, 3, 1, 1))
    fresh = [plan.decoded_before(step + 1) - plan.decoded_before(step) for step in range(plan.total_steps)]
    assert fresh == [8] + [2] * 19 + [6] + [3] * 6 + [6] * 3
    stages = samples_by_step(plan)
    for step, samples in enumerate(stages):
        assert {s.stage for s in samples} == {plan.index(step)}
        first = plan.decoded_before(plan.start(plan.index(step)))
        assert all(first <= s.number < plan.decoded_before(step + 1) for s in samples)  # nothing from the stage before
    # Away from the ends of the stage, every sample is shown in `replay` steps, spread over the buffer's depth.
    shown = {}
    for step, samples in enumerate(stages[:20]):
        for sample in samples:
            shown.setdefault(sample.number, []).append(step)
    steady = [steps for number, steps in shown.items() if 16 <= number < 8 + 2 * 8]
    assert steady and all(len(steps) == 4 and steps[-1] - steps[0] == 2 * 4 + 3 for steps in steady)


@FEW
@given(plan=replay_plans(), world_size=st.integers(1, 3), micro=st.integers(1, 4), data=st.data())
def test_replay_depends_on_neither_ranks_nor_micro_batches_nor_restarts(plan, world_size, micro, data):
    unit = plan.stages[0].views_per_image * plan.stages[0].masks_per_image
    if any(stage.batch_size % (unit * world_size) for stage in plan.stages):
        world_size = 1
    first_step = data.draw(st.integers(0, plan.total_steps))
    assert samples_by_step(plan, 5, micro * unit, first_step, world_size) == samples_by_step(plan, 5)[first_step:]


@pytest.mark.usefixtures("chunks_of_two")
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_a_buffer_changes_no_batch(workers):
    """With a buffer, whatever the workers and ranks, after any restart: what decoding every sample anew would give."""
    source = Noise(11, damaged=(4,))
    plan = replaying(11, (8, 7, 4, 2), (8, 5, 2, 2), views=2, masks=2)
    wanted = [
        torch.stack([alone(source, 0 if s.index == 4 else s.index, s.number, plan.stages[s.stage]) for s in samples])
        for samples in samples_by_step(plan, seed=7)
    ]
    for first_step, world_size in ((0, 1), (5, 2), (9, 1)) if workers in (0, 2) else ((0, 1),):
        ranks = [
            batches(source, plan, workers=workers, micro_size=4, first_step=first_step, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        per_step = 2 // world_size  # micro-batches of 4 rows
        for step in range(first_step, plan.total_steps):
            at = (step - first_step) * per_step
            found = torch.cat([batch for rank in ranks for batch in rank[at : at + per_step]])
            assert found.equal(wanted[step]), (step, world_size)
        assert all(len(rank) == (plan.total_steps - first_step) * per_step for rank in ranks)


def test_a_replayed_sample_is_read_once_and_views_share_a_read():
    reads = []

    class Counted(Noise):
        def read(self, index):
            reads.append(index)
            return super().read(index)

    plan = replaying(50, (12, 8, 4, 2), views=3, masks=2)
    batches(Counted(50), plan, micro_size=6)
    assert (
        len(reads)
        == plan.decoded_images
        == 2 + 1 * 0 + sum(plan.decoded_before(s + 1) - plan.decoded_before(s) for s in range(1, 8))
    )
    assert plan.total_images == 96 and plan.decoded_images < 96 / 6


def test_views_of_one_image_differ_and_masks_repeat_a_view():
    plan = replaying(9, (12, 1, 1, 1), views=3, masks=2)
    (batch,) = batches(Noise(9), plan, micro_size=12)
    images = batch.reshape(2, 3, 2, -1)  # image, view, mask
    assert images[:, :, 0].equal(images[:, :, 1])
    assert len({tuple(view.tolist()) for view in images[:, :, 0].flatten(0, 1)}) == 6


# ---------------------------------------------------------------------------------------------------- damaged files


def ten_kinds_of_damage() -> dict[str, bytes]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))

    def file(kind: str) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        return buffer.getvalue()

    jpeg, png, webp, tiff = (file(kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF"))
    npy = io.BytesIO()
    np.save(npy, np.zeros((40, 50, 3), np.uint8))
    huge = png[:16] + (200_000).to_bytes(4, "big") * 2 + png[24:]
    return {
        "empty.jpg": b"",
        "text.jpg": b"<html>404 Not Found</html>",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:200],
        "zeros.jpg": b"\xff\xd8\xff\xe0" + bytes(2000),
        "cut.png": png[: len(png) // 2],
        "huge.png": huge[:29] + zlib.crc32(huge[12:29]).to_bytes(4, "big") + huge[33:],
        "cut.webp": webp[: len(webp) // 2],
        "cut.tif": tiff[: len(tiff) // 2],
        "cut.npy": npy.getvalue()[:-100],
    }


@pytest.mark.parametrize("operator", ["fourier", "scaled"])
def test_a_twentieth_of_damaged_files_of_ten_kinds(tmp_path, caplog, operator):
    """190 sound files and 10 damaged ones: each is named, the run goes on below the limit and stops above it."""
    for i in range(190):
        pixels = np.full((24, 30, 3), i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:03}.{('jpg', 'png')[i % 2]}")
    damage = ten_kinds_of_damage()
    for i, (name, data) in enumerate(damage.items()):
        (tmp_path / f"{19 * i:03}-{name}").write_bytes(data)
    source, plan = open_source(tmp_path), curriculum(200, (20, 11), (10, 5))
    assert len(source) == 200
    with caplog.at_level(logging.WARNING, logger="mae_et.data.loader"):
        wanted = batches(source, plan, operator, limit=0.05, micro_size=20)
    assert len(wanted) == 16
    named = [r.getMessage() for r in caplog.records if "damaged image skipped" in r.getMessage()]
    assert len(named) == 10
    assert all(any(name in message for message in named) for name in damage)
    assert all("\n" not in message and " at 0x" not in message for message in named)
    found = batches(source, plan, operator, limit=0.05, micro_size=20, workers=2)
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match=r"10 of 200 images are damaged, more than --damaged_limit 0\.049"):
        batches(source, plan, operator, limit=0.049, micro_size=20, workers=2)

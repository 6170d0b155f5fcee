"""What can be told of steps on a GPU without one. Run by test_nullgpu.py, in a process that sees the null GPU."""

from __future__ import annotations

import pytest
import torch

from nullgpu.counters import counting, no_sync
from nullgpu.steps import SMALL, started, steady, step


def test_the_null_gpu_sees_what_these_tests_look_for():
    x = torch.zeros(4, 4, device="cuda")
    with counting() as found:
        (x @ x + 1).copy_(torch.zeros(4, 4))
    assert (found["gemms"], found["launches"], found["pageable"]) == (1, 1, 1)
    assert found["peak"] >= 2 * 512, "blocks of the allocator are 512 bytes"
    with no_sync(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(80 << 30, dtype=torch.uint8, device="cuda")


def test_capture_follows_the_rules_of_cuda():
    x = torch.zeros(4, device="cuda")
    with counting() as found, torch.cuda.graph(torch.cuda.CUDAGraph()):
        x += 1
    assert (found["launches"], found["nodes"]) == (0, 1)
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    torch.zeros(4, device="cuda")  # and the process goes on


@pytest.mark.parametrize(
    "flags",
    [
        "--target hog --clip_grad 1",
        "--decoder cross --norm_pix_loss --predict_ratio 0.5 --lowfreq scaled --activation_checkpointing",
    ],
)
def test_no_steady_step_waits_for_the_device(flags):
    with started(f"{SMALL} {flags}") as run:
        for stage in run.curriculum.stages:
            batches = steady(run, stage)
            with no_sync(), counting() as found:
                step(run, stage, batches)
            assert (found["syncs"], found["pageable"], found["mallocs"]) == (0, 0, 0), stage


def test_launches_of_a_step_do_not_grow_with_its_images():
    """Of ViT-B. They are what a host has to keep up with, whatever the GPU."""
    with started("--recipe in1k_vitb_etpp400_hog --batch_size 512 --total_batch_size 512") as run:
        for stage in run.curriculum.stages[::2]:
            batches = steady(run, stage)
            with counting() as found:
                step(run, stage, batches)
            assert 500 < found["launches"] + found["gemms"] + found["memsets"] <= 1450, stage


@pytest.mark.parametrize("flags", ["", "--fsdp"])
def test_ranks_add_collectives_and_no_waiting(flags):
    with started(f"{SMALL} {flags}", ranks=8) as run:
        stage = run.curriculum.stages[0]
        batches = steady(run, stage)
        if not flags:
            for _ in range(10):  # in which DDP reads its own clocks
                step(run, stage, batches)
        with no_sync(), counting() as found:
            step(run, stage, batches)
        assert found["collectives"] > 1 and (found["syncs"], found["pageable"]) == (0, 0)

"""What can be told of steps on a GPU without one. Run by test_nullgpu.py, in a process that sees the null GPU."""

from __future__ import annotations

import pytest
import torch

from mae_et.engine.run import PretrainRun
from mae_et.plan.gpu import GpuStep
from nullgpu.counters import counting, no_sync
from nullgpu.steps import SMALL, started, steady, step

VIT_B = "--recipe in1k_vitb_etpp400_hog --batch_size 512 --total_batch_size 512"


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


@pytest.mark.parametrize("graphs", ["on", "off"])
@pytest.mark.parametrize(
    "flags",
    [
        "--target hog --clip_grad 1 --total_batch_size 32",
        "--opt muon --decoder cross --clip_grad 1",
        "--decoder cross --norm_pix_loss --predict_ratio 0.5 --lowfreq scaled --activation_checkpointing",
    ],
)
def test_no_steady_step_waits_for_the_device(flags, graphs):
    with started(f"{SMALL} {flags} --cuda_graphs {graphs}") as run:
        for stage in run.curriculum.stages:
            batches = steady(run, stage)
            with no_sync(), counting() as found:
                step(run, stage, batches)
            assert (found["syncs"], found["pageable"], found["mallocs"]) == (0, 0, 0), stage
            assert found["graphs"] == (len(batches) if graphs == "on" else 0), stage
        assert len(run.graphs) == (3 if graphs == "on" else 0), "a graph for each stage: all micro-batches are alike"


#: Wide enough that what a formula leaves out is small: blocks of the allocator are up to a megabyte too large.
WIDE = "--model mae_vit_base_patch16 --depth 2 --decoder_depth 2 --curriculum et_pp --epochs 400"


@pytest.mark.parametrize(
    ("flags", "ranks", "tolerance"),
    [
        ("--recipe in1k_vitb_etpp400_hog --total_batch_size 512", 1, 0.01),
        (f"{WIDE} --norm_pix_loss --batch_size 128 --total_batch_size 256", 1, 0.02),
        (f"{WIDE} --norm_pix_loss --batch_size 128 --opt muon", 1, 0.02),
        (f"{WIDE} --norm_pix_loss --batch_size 4 --opt muon", 1, 0.02),  # where the update is the peak
        (f"{WIDE} --decoder cross --predict_ratio 0.5 --batch_size 64 --total_batch_size 1024", 8, 0.16),
        (f"{WIDE} --norm_pix_loss --activation_checkpointing --batch_size 256 --total_batch_size 256", 1, 0.1),
    ],
)
def test_a_step_takes_the_memory_and_launches_of_the_plan(flags, ranks, tolerance):
    with started(f"{flags} --cuda_graphs off", ranks) as run:
        for stage in run.curriculum.stages[::2]:
            planned = GpuStep.of(run.config, run.curriculum, stage, ranks)
            batches = steady(run, stage)
            assert len(batches) == planned.micro_batches
            with counting() as found:
                step(run, stage, batches)
            # On a busy machine DDP has been seen to hold its gradients twice, 14 % of this small model's peak.
            assert planned.peak_memory_bytes == pytest.approx(found["peak"], rel=tolerance), stage
            launches = found["launches"] + found["gemms"] + found["memsets"]
            assert planned.micro_batches * planned.launches + planned.update_launches == pytest.approx(
                launches, rel=0.15
            ), stage


def test_graphs_leave_the_host_the_update_and_share_the_memory_of_the_largest():
    """Of ViT-B, whatever the GPU and the number of images."""
    with started(f"{VIT_B} --cuda_graphs on") as run:
        reserved, needed = torch.cuda.memory_reserved(), []
        for stage, cost in zip(run.curriculum.stages, run.ledger.stages, strict=True):
            planned = GpuStep.of(run.config, run.curriculum, stage, 1)
            assert planned.peak_memory_bytes == pytest.approx(cost.peak_memory_bytes, rel=0.02), stage
            needed.append(cost.peak_memory_bytes)
            batches = steady(run, stage)
            with counting() as found:
                step(run, stage, batches)
            assert 10 < found["launches"] + found["gemms"] + found["memsets"] <= 40, stage
        assert max(needed) < reserved < 1.2 * max(needed)


def test_what_does_not_fit_fails_before_the_first_step_and_before_anything_is_captured():
    with pytest.raises(torch.OutOfMemoryError), started(f"{VIT_B} --batch_size 2048 --total_batch_size 2048"):
        pass
    torch.cuda.empty_cache()


def test_a_step_that_cannot_be_captured_is_launched_kernel_by_kernel_and_said_once(monkeypatch, caplog):
    loss = PretrainRun.loss

    def waits(*arguments):
        value = loss(*arguments)
        return value + value.item()

    monkeypatch.setattr(PretrainRun, "loss", waits)
    with started(SMALL) as run:
        assert not run.graphs
        step(run, run.curriculum.stages[0], steady(run, run.curriculum.stages[0]))
        assert all(parameter.grad is None for parameter in run.model.parameters())
    assert caplog.text.count("no CUDA graphs: a step can't be captured") == 1
    with (
        pytest.raises(ValueError, match=r"^--cuda_graphs on: .*; choose auto or off$"),
        started(f"{SMALL} --cuda_graphs on"),
    ):
        pass


@pytest.mark.parametrize("flags", ["--cuda_graphs off", "--cuda_graphs on --total_batch_size 256", "--fsdp"])
def test_ranks_add_collectives_and_no_waiting(flags):
    with started(f"{SMALL} --total_batch_size 128 {flags}", ranks=8) as run:
        stage = run.curriculum.stages[-1]
        batches = steady(run, stage)
        if "off" in flags:
            for _ in range(10):  # in which DDP reads its own clocks
                step(run, stage, batches)
        with no_sync(), counting() as found:
            step(run, stage, batches)
        assert (found["syncs"], found["pageable"]) == (0, 0)
        if "on" in flags:  # one graph averages gradients, the other doesn't
            assert (found["graphs"], found["collectives"], len(run.graphs)) == (2, 1, 5)
        else:
            assert found["collectives"] > 1


def test_a_save_copies_into_pinned_memory_and_waits_once(tmp_path):
    with started(f"{SMALL} --output_dir {tmp_path}") as run:
        stage = run.curriculum.stages[0]
        step(run, stage, steady(run, stage))
        with counting() as found, run.writer:
            run.save()
        assert (found["pageable"], found["syncs"]) == (0, 1)
        assert (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("flags", "timed", "chosen"),
    [
        ("--attention auto", {"flash", "efficient", "math"}, {"flash", "efficient", "math"}),  # it has no cuDNN
        ("--attention auto --deterministic", set(), {"flash"}),
    ],
)
def test_attention_is_timed_unless_bits_count(flags, timed, chosen):
    with started(f"{SMALL} --decoder cross --activation_checkpointing {flags}") as run:
        stage = run.curriculum.stages[-1]
        assert run.attention[stage].milliseconds.keys() == timed and run.attention[stage].backend in chosen
        step(run, stage, steady(run, stage))


def test_attention_that_a_device_lacks_is_refused():
    with (
        pytest.raises(ValueError, match=r"^--attention cudnn can't compute 16 images of \d+ px in bf16"),
        started(f"{SMALL} --attention cudnn"),
    ):
        pass

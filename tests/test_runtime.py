"""What a process sets before it trains."""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import platform
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import in_a_process, on_ranks
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mae_et
from mae_et.engine import device, meters, optim, runtime

PR_SET_THP_DISABLE = 41


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_a_step_frees_is_used_again(tmp_path: Path) -> None:
    in_a_process(tmp_path / "log.txt", _allocate)


def _allocate() -> None:
    assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0  # pages of 2 MiB would hide what is counted
    assert _faults() >= 4 * 32768, "4 KiB pages of four tensors"
    with runtime.start("cpu"):
        _faults()  # the first one has to come from the system
        assert _faults() < 100


def _faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(32 * 2**20)  # 128 MiB, which glibc would map and unmap each time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_idle_threads_spin_for_a_moment_unless_the_user_says_otherwise(given, spins, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(mae_et)
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_ranks_sleep_before_they_fork(tmp_path: Path) -> None:
    """So that no thread of gloo holds a lock of the interpreter, which the new process would wait for."""
    on_ranks(2, tmp_path / "log", _fork)


def _fork() -> None:
    with runtime.start("cpu"):
        slept: list[float] = []
        with mock.patch.object(time, "sleep", slept.append):
            if (process := os.fork()) == 0:
                os._exit(0)
        os.waitpid(process, 0)
        assert slept == [0.02]


def test_what_the_first_rank_fails_at_ends_all(tmp_path: Path) -> None:
    """They don't wait in the store, where Python's signal handlers aren't heard, for what will not come."""
    on_ranks(2, tmp_path / "log", _fail)


def _fail() -> None:
    with runtime.start("cpu") as rt, pytest.raises(FileNotFoundError), rt.main_first():
        raise FileNotFoundError("--data_path TYPO does not exist")


def test_ranks_wait_for_the_slowest_without_a_collective() -> None:
    store, came = dist.HashStore(), []

    def come(rank: int) -> None:
        time.sleep(0.3 * rank)
        came.append(rank)
        runtime.Runtime(torch.device("cpu"), "fp32", rank, 3, store).wait_for_ranks("cached")
        assert len(came) == 3

    with ThreadPoolExecutor(3) as ranks:
        list(ranks.map(come, range(3)))  # raises what a thread did
    runtime.Runtime(torch.device("cpu"), "fp32").wait_for_ranks("cached")  # alone


def test_ranks_agree_on_what_they_know(tmp_path: Path) -> None:
    on_ranks(2, tmp_path / "log", _agree)


def _agree() -> None:
    with runtime.start("cpu") as rt:
        assert rt.from_main([rt.rank]) == [0]
        rt.check_equal_on_ranks(one=1, mine=None if rt.is_main else 2**60 - 1, nobodys=None)
        with pytest.raises(ValueError, match="ranks differ in two: 0 to 1"):
            rt.check_equal_on_ranks(one=1, two=rt.rank)


class Queue:
    """A GPU's queue on a clock of its own: work takes time, events are passed in order."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def work(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds

    def event(self, device: torch.device, enable_timing: bool) -> Queue.Event:
        assert device.type in ("cuda", "xpu") and enable_timing
        return Queue.Event(self)

    class Event:
        def __init__(self, queue: Queue) -> None:
            self.queue, self.at = queue, math.nan

        def record(self) -> None:
            self.at = self.queue.device = max(self.queue.device, self.queue.host)

        def synchronize(self) -> None:
            self.queue.host = max(self.queue.host, self.at)

        def elapsed_time(self, end: Queue.Event) -> float:
            return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_gpu_waits_for_data_only_where_it_has_no_work_left(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    monkeypatch.setattr(torch, "Event", queue.event)
    idle = meters.IdleTime(torch.device(kind))

    def steps(number: int, load: float, compute: float) -> float:
        for _ in range(number):
            with idle.waiting():
                queue.host += load
            queue.work(compute)
        return idle.read()

    steps(1, 0, 3)
    assert steps(10, load=2, compute=3) == pytest.approx(0), "the host waits for 20 s, the GPU never"
    idle.read()
    assert steps(10, load=3, compute=2) == pytest.approx(10, abs=2), "each batch comes a second late"
    assert idle.read() == 0


def test_a_cpu_waits_as_long_as_its_host() -> None:
    idle = meters.IdleTime(torch.device("cpu"))
    with idle.waiting():
        time.sleep(0.05)
    assert 0.05 <= idle.read() < 5
    assert idle.read() == 0


@pytest.mark.parametrize(
    ("precision", "fast", "warns"), [("bf16", False, True), ("bf16", True, False), ("auto", False, False)]
)
def test_slow_bf16_is_said(monkeypatch, caplog, precision: str, fast: bool, warns: bool) -> None:
    monkeypatch.setattr(device, "has_fast_bf16", lambda _: fast)
    with runtime.start("cpu", precision) as rt:
        assert rt.precision == ("bf16" if precision == "bf16" else "fp32")
    assert ("--precision fp32" in caplog.text) == warns


@pytest.mark.parametrize(
    "message",
    [
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "wait timeout after 86400000ms, keys: /restart_0/main_first",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9999",
    ],
)
def test_a_lost_rank_is_told_from_what_torch_says(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_join", lambda *where: None)
    monkeypatch.setattr(runtime.dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConnectionError, match="another rank has died"), runtime.start("cpu"):
        raise RuntimeError(message)


# ── accelerators that are not here ──


class Accelerator:
    """Stands for torch.accelerator, and the device's own module, on a machine with two devices of a kind."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.called = kind, []
        monkeypatch.setattr(torch, "accelerator", self)
        monkeypatch.setattr(torch, "get_device_module", lambda _: self)

    def current_accelerator(self, check_available: bool) -> torch.device:
        assert check_available, "that torch was built for it is not enough"
        return torch.device(self.kind)

    def device_count(self) -> int:
        return 2

    def is_bf16_supported(self, including_emulation: bool) -> bool:
        assert not including_emulation
        return True

    def get_device_name(self, device: torch.device) -> str:
        return f"fake {device}"

    def __getattr__(self, name: str):
        return lambda *arguments: self.called.append((name, *map(str, arguments)))


def test_any_accelerator_of_torch_is_taken(monkeypatch, caplog) -> None:
    fake = Accelerator("xpu", monkeypatch)
    with runtime.start("xpu:1") as rt:
        assert (rt.describe(), rt.pins) == ("xpu (fake xpu:1), bf16", True)
        rt.synchronize()
        meters.reset_peak_memory(rt.device)
        meters.peak_memory_bytes(rt.device)
        assert meters.EnergyMeter(rt.device).since() == 0, "not that of the CPU beside it"
    names = "set_device_index synchronize empty_cache reset_peak_memory_stats max_memory_allocated"
    assert [name for name, *_ in fake.called] == names.split()
    assert all(where in ([], ["xpu:1"]) for _, *where in fake.called)
    assert "xpu: no --fsdp" in caplog.text


@pytest.mark.parametrize(
    ("kind", "ranks", "given", "chosen"),
    [
        ("xpu", 1, "auto", "cpu"),  # not one that we have not tried, unless it is named
        ("xpu", 1, "xpu", "xpu:0"),
        ("xpu", 2, "xpu:0", "xpu:1"),  # the rank's own
        ("cuda", 1, "auto", "cuda:0"),
        ("cuda", 1, "cpu", "cpu"),
        ("cuda", 1, "cuda:2", "--device cuda:2: this machine has 2 cuda devices"),
        ("cuda", 1, "xpu", "--device xpu: torch finds no such device here; choose from auto, cuda, cuda:N, cpu"),
        ("xpu", 1, "gpu", "unknown --device 'gpu'; choose from auto, xpu, xpu:N, cpu"),
        ("mps", 2, "mps", "--device mps: torch has one such device and no ranks on it; start one process, or use cpu"),
    ],
)
def test_devices_are_chosen_or_refused(kind: str, ranks: int, given: str, chosen: str, monkeypatch) -> None:
    Accelerator(kind, monkeypatch)
    try:
        found = str(device.choose(given, ranks - 1, ranks))
    except ValueError as error:
        found = str(error)
    assert found == chosen


def test_without_an_accelerator_there_is_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert device.choose("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"^--device cuda: torch finds no such device here; choose from auto, cpu$"):
        device.choose("cuda")


def test_where_a_kernel_may_not_heed_the_guard_the_host_does(monkeypatch) -> None:
    """torch's fused AdamW skips a step on CPUs and CUDA; of others nobody says so."""
    monkeypatch.setattr(torch, "isfinite", lambda loss: False)
    optim.guarded_step(None, SimpleNamespace(device=torch.device("xpu")))  # a step would fail: there is no optimiser


# ── exactness ──


@pytest.mark.filterwarnings("ignore")
def test_tf32_is_off_whatever_another_library_says() -> None:
    """Both sets of torch's names say so, or reading the older one, as torch.compile does, would raise."""
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    device._exact_float32()
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_deterministic_kernels_while_a_run_runs_and_no_longer(monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    flags = (
        torch.are_deterministic_algorithms_enabled,
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.math_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.cudnn_sdp_enabled,
    )
    before = [flag() for flag in flags]
    with runtime.start("cpu", deterministic=True):
        assert [flag() for flag in flags] == [True, True, True, False, False]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.zeros(2, 2).put_(torch.tensor([0, 0]), torch.ones(2))
    assert [flag() for flag in flags] == before


# ── one process that stands for several ──


def test_one_process_is_wrapped_as_several_are(monkeypatch) -> None:
    """MAE_ET_WRAP=1: the gradients of DDP and of FSDP2 of one rank are those of the bare model."""
    monkeypatch.setenv("MAE_ET_WRAP", "1")
    model = torch.nn.Linear(3, 2)
    model(torch.ones(3)).sum().backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    with runtime.start("cpu", "fp32") as rt:
        assert rt.is_distributed and rt.world_size == 1
        network = rt.parallel(model)
        assert isinstance(network, DistributedDataParallel)
        network(torch.ones(3)).sum().backward()
        assert torch.equal(model.weight.grad, expected)
        del network
        sharded = torch.nn.Sequential(torch.nn.Linear(3, 2))
        rt.shard(sharded, [[sharded[0]]])
        sharded(torch.ones(3)).sum().backward()
        assert isinstance(sharded[0].weight, DTensor)
        assert torch.equal(sharded[0].weight.grad.full_tensor(), expected)
    assert not torch.distributed.is_initialized()


def test_a_cpu_is_its_model_and_as_many_cores_as_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr("mae_et.engine.device.CPU_INFO", info)
    monkeypatch.setattr("platform.processor", lambda: "")
    for cores, said in (({3}, "1 core"), ({0, 5}, "2 cores")):
        monkeypatch.setattr("os.sched_getaffinity", lambda process, cores=cores: cores, raising=False)
        with runtime.start("cpu", "fp32") as rt:
            assert rt.describe() == f"cpu ({said}), fp32"
            for name, model in (("EPYC  7B13 ", "EPYC 7B13"), ("Xeon: 4 GHz", "Xeon: 4 GHz")):
                info.write_text(f"vendor_id : x\nmodel\t\t: 1\nmodel name\t: {name}\n\nmodel name\t: another\n")
                assert rt.describe() == f"cpu ({said}, {model}), fp32"
        info.unlink()

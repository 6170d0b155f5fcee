"""Which kernel computes attention: shapes that are timed, the fastest that works, and what is refused."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mae_et.engine import attention
from mae_et.engine.runtime import Runtime
from mae_et.model import create_mae
from mae_et.plan.curriculum import Stage

CPU = Runtime(torch.device("cpu"), "fp32")
STAGE = Stage(size_px=32, num_visible=4, num_predicted=5, batch_size=6)


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_what_is_timed_is_what_blocks_compute(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and strides of q, k, v and of the gradient, and how often, as the model itself calls it."""
    shape = {"embed_dim": 24, "depth": 3, "num_heads": 2, "decoder_embed_dim": 32, "decoder_depth": 2}
    model = create_mae(img_size=32, patch_size=8, decoder_num_heads=4, decoder=decoder, **shape)
    seen, compute = [], F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        out, layouts = compute(q, k, v), [(t.shape, t.stride()) for t in (q, k, v)]
        out.register_hook(lambda gradient: seen.append((*layouts, (gradient.shape, gradient.stride()))))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model(torch.randn(3, 3, 32, 32), STAGE.num_visible, STAGE.num_predicted).pred.sum().backward()
    blocks, seen[:] = list(seen), []
    for one in attention.attentions(model.shape, STAGE):
        call = attention.call_of(one, 3, CPU)
        for _ in range(one.blocks):
            call()
    assert sorted(seen) == sorted(blocks) and len(seen) == 5


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device on which `milliseconds` says how long each backend takes; None: it raises."""
    fake = SimpleNamespace(milliseconds={}, active=None)

    @contextmanager
    def using(backend):
        fake.active = backend
        yield

    def call() -> None:
        if fake.milliseconds.get(fake.active) is None:
            raise RuntimeError("No available kernel.\nMore.")

    monkeypatch.setattr(attention, "using", using)
    monkeypatch.setattr(attention, "call_of", lambda one, images, rt: call)
    monkeypatch.setattr(attention, "milliseconds", lambda call, device: fake.milliseconds[fake.active])
    return fake


GPU = Runtime(torch.device("cuda"), "bf16")
SHAPE = create_mae("mae_vit_tiny_patch16", img_size=32, depth=1, decoder_depth=2).shape


def test_the_fastest_that_works_is_taken(gpu: SimpleNamespace) -> None:
    gpu.milliseconds = {"flash": 3.0, "cudnn": None, "efficient": 2.0, "math": 5.0}
    choice = attention.choose("auto", SHAPE, STAGE, 8, GPU)
    assert choice.backend == "efficient"
    assert choice.milliseconds == {"flash": 9.0, "efficient": 6.0, "math": 15.0}, "of one block and two"
    gpu.milliseconds = {}
    assert attention.choose("auto", SHAPE, STAGE, 8, GPU).backend is None, "the step itself will say what is wrong"


def test_a_fixed_backend_is_taken_or_refused(gpu: SimpleNamespace) -> None:
    gpu.milliseconds = {"flash": 3.0, "efficient": 2.0}
    assert attention.choose("flash", SHAPE, STAGE, 8, GPU) == ("flash", {})
    with pytest.raises(ValueError, match=r"^--attention cudnn can't compute 8 images of 32 px in bf16 \(No available "):
        attention.choose("cudnn", SHAPE, STAGE, 8, GPU)


def test_what_is_deterministic_is_not_timed(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock would choose one in this run and another one in the next."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    gpu.milliseconds = {"flash": 9.0, "efficient": 1.0, "math": 2.0}
    assert attention.choose("auto", SHAPE, STAGE, 8, GPU) == ("flash", {})
    gpu.milliseconds["flash"] = None  # as in float32
    assert attention.choose("auto", SHAPE, STAGE, 8, GPU) == ("math", {})


def test_a_cpu_has_no_choice() -> None:
    assert attention.choose("auto", SHAPE, STAGE, 8, CPU) == (None, {})
    with pytest.raises(ValueError, match=r"^--attention flash is for CUDA devices, not for cpu; leave it at auto$"):
        attention.choose("flash", SHAPE, STAGE, 8, CPU)

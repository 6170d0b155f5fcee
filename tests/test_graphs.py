"""Where CUDA graphs are asked for. What they do is tested on the null GPU, in nullgpu/cases.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from mae_et.engine.graphs import wants_graphs
from mae_et.engine.runtime import Runtime

CPU, CUDA = (Runtime(torch.device(name), "fp32") for name in ("cpu", "cuda"))


def test_graphs_are_for_cuda_without_shards():
    cases = itertools.product(("auto", "off"), (CPU, CUDA), (False, True))
    wanted = [
        (setting, rt.device.type, sharded) for setting, rt, sharded in cases if wants_graphs(setting, rt, sharded)
    ]
    assert wanted == [("auto", "cuda", False)]
    assert wants_graphs("on", CUDA, sharded=False)


@pytest.mark.parametrize(("rt", "sharded", "reason"), [(CPU, False, "none on cpu"), (CUDA, True, "--fsdp gathers")])
def test_where_they_cannot_be_is_said(rt: Runtime, sharded: bool, reason: str):
    with pytest.raises(ValueError, match=f"^--cuda_graphs on: .*{reason}.*; choose auto or off$"):
        wants_graphs("on", rt, sharded)

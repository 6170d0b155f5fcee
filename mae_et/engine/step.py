"""One optimiser step, and when a loop looks at results, saves and reports: for pretraining and fine-tuning alike."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..data.stream import micro_batches
from ..plan.cost import Ledger
from ..plan.curriculum import Curriculum, Stage
from .meters import IdleTime
from .optim import guarded_step, set_learning_rate
from .runtime import Runtime
from .writer import Writer


@dataclass
class Run(ABC):
    """State of a training run. Only `step`, `ledger` and the weights change."""

    config: Any
    rt: Runtime
    curriculum: Curriculum
    model: nn.Module
    network: nn.Module
    """The model, averaging gradients over ranks where there are several."""
    optimizer: torch.optim.Optimizer
    ledger: Ledger
    step: int
    idle: IdleTime = field(init=False)
    writer: Writer = field(init=False)

    def __post_init__(self) -> None:
        self.idle = IdleTime(self.rt.device)
        self.writer = Writer()

    @property
    def micro_size(self) -> int:
        """Images of a full-size micro-batch."""
        return self.config.batch_size

    @property
    def finished(self) -> bool:
        return self.step == self.curriculum.total_steps

    def micro_batches(self, stage: Stage, rank: int | None = None) -> list[range]:
        """A rank's rows of a step, by default this one's, one range for each micro-batch."""
        size, rank = stage.micro_size(self.micro_size), self.rt.rank if rank is None else rank
        return micro_batches(stage.batch_size, size, rank, self.rt.world_size, stage.rows_per_image)

    def kernels(self, stage: Stage) -> contextlib.AbstractContextManager:
        """Context of forward and backward that says which kernels compute them; by default torch's choice."""
        return contextlib.nullcontext()

    @abstractmethod
    def micro_loss(self, batch: Any, stage: Stage, rows: range) -> Tensor:
        """Mean loss of a micro-batch, `rows` of the batch of step number `self.step`."""

    def accumulate(self, batch: Any, stage: Stage, rows: range, reduce: bool) -> Tensor:
        """Add the gradients of a micro-batch from the loader, as :meth:`backward` does."""
        return self.backward(batch, stage, rows, reduce)

    def backward(self, batch: Any, stage: Stage, rows: range, reduce: bool) -> Tensor:
        """Forward and backward of a micro-batch; returns its share of the step's loss.

        Every image weighs 1/batch in loss and gradient, however a step is split. reduce: average gradients over ranks.
        """
        local = contextlib.nullcontext() if reduce else self.rt.local_gradients(self.network)
        with self.kernels(stage), local:
            share = self.micro_loss(batch, stage, rows) * (len(rows) / stage.batch_size)
            (share * self.rt.world_size).backward()  # DDP takes the mean over ranks; the sum is meant
        return share.detach()

    def zero_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def take_step(run: Run, batches: Iterator[Any], stage: Stage, lr: float, stopping: bool = False) -> Tensor:
    """One optimiser step. Returns [loss, number of ranks `stopping`, gradient norm], on the device."""
    loss = accumulate_gradients(run, batches, stage)
    # Over ranks: the sum of their shares of the loss, and of those that were asked to stop.
    outcome = run.rt.sum(torch.stack([loss, torch.full_like(loss, stopping)]))
    norm = nn.utils.get_total_norm(p.grad for p in run.model.parameters() if p.grad is not None)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if run.config.clip_grad is not None:
        nn.utils.clip_grads_with_norm_(run.model.parameters(), run.config.clip_grad, norm)
    set_learning_rate(run.optimizer, lr)
    guarded_step(run.optimizer, outcome[0] + norm)  # finite only if both are
    run.zero_gradients()
    return torch.cat([outcome, norm[None]])


def accumulate_gradients(run: Run, batches: Iterator[Any], stage: Stage) -> Tensor:
    """Forward and backward of this rank's rows of one step; returns its share of the loss."""
    loss = torch.zeros((), device=run.rt.device)
    micro_batches = run.micro_batches(stage)
    for rows in micro_batches:
        with run.idle.waiting():
            batch = next(batches)
        loss += run.accumulate(batch, stage, rows, reduce=rows is micro_batches[-1])
    return loss


class Due(NamedTuple):
    """What is due after a step."""

    look: bool
    """Wait for the device and check the results of the latest steps."""
    stop: bool
    """All ranks look, so they may stop together."""
    save: bool
    report: bool


@dataclass
class Cadence:
    """Decides when a loop looks at its results, saves and reports. The host waits for the device only then."""

    look_steps: int
    save_steps: int
    save_minutes: float
    every_step: bool
    """Look after every step: the host waits for a CPU anyway."""
    one_rank: bool
    any_rank: Callable[[bool], bool]
    """Whether something holds on any rank; all ranks ask together."""
    collective_saves: bool = False
    """Saving takes all ranks (a sharded model)."""
    clock: Callable[[], float] = field(default_factory=lambda: time.monotonic)
    saved_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.saved_at = self.clock()

    @classmethod
    def of(cls, run: Run, look_steps: int, collective_saves: bool = False) -> Cadence:
        config, rt = run.config, run.rt
        on_cpu = rt.device.type == "cpu"
        times = look_steps, config.save_steps, config.save_minutes
        return cls(*times, on_cpu, rt.world_size == 1, rt.any, collective_saves)

    def after(self, step: int, *, save: bool = False, report: bool = False, stopping: bool = False) -> Due:
        """What is due after `step` steps. save, report: due in any case. stopping: this rank was asked to stop."""
        save = save or (self.save_steps > 0 and step % self.save_steps == 0)
        report = report or step % self.look_steps == 0
        # All ranks must check for a stop at the same steps, so this may not depend on wall-clock time.
        stop = save or report or self.every_step or (self.one_rank and stopping)
        late = self.clock() - self.saved_at > 60 * self.save_minutes
        # A collective save is triggered by any rank's clock, at a step where all ranks look.
        save = save or ((stop and self.any_rank(late)) if self.collective_saves else late)
        return Due(look=stop or save, stop=stop, save=save, report=report or save)

    def saved(self) -> None:
        self.saved_at = self.clock()


class Outcomes:
    """Results of :func:`take_step`: on the device until the host looks at them, then averaged between reports."""

    def __init__(self) -> None:
        self._on_device: list[Tensor] = []
        self._seen: list[list[float]] = []

    def add(self, outcome: Tensor) -> None:
        self._on_device.append(outcome)

    def look(self, next_step: int, where: str = "") -> bool:
        """Wait for the device; whether a rank was asked to stop. where: completes "at step 7 …" in the error.

        Raises FloatingPointError if a loss or a gradient was not finite: that step did not update the weights.
        """
        latest = torch.stack(self._on_device).tolist()
        self._on_device = []
        for step, (loss, _, norm) in enumerate(latest, next_step - len(latest)):
            if not math.isfinite(loss + norm):
                gradient = "" if math.isfinite(norm) else f" and the gradient's norm {norm}"
                raise FloatingPointError(
                    f"loss is {loss}{gradient} at step {step}{where}; the weights were not updated with it, and what "
                    "was saved before is intact; try a lower --lr or --blr, or --clip_grad 1"
                )
        self._seen += latest
        return latest[-1][1] > 0

    def report(self) -> tuple[float, float]:
        """Mean loss since the last report, and the gradient norm of the latest step."""
        mean, norm = sum(loss for loss, *_ in self._seen) / len(self._seen), self._seen[-1][2]
        self._seen = []
        return mean, norm


@contextlib.contextmanager
def evaluation_time(run: Run, index: int) -> Iterator[None]:
    """Book what is not training, pictures and checkpoints too, under eval_seconds of stage number `index`."""
    began = time.perf_counter()
    yield
    run.ledger.stages[index].eval_seconds += time.perf_counter() - began

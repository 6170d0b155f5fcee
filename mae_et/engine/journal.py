"""What a person sees of a fine-tuning run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..plan.cost import Ledger
from ..plan.curriculum import Curriculum
from . import run_folder

log = logging.getLogger(__name__)


class Journal:
    """Says how a run goes, on the console, in metrics.jsonl and on TensorBoard. Off on all ranks but one."""

    def __init__(
        self, folder: Path, log_dir: str | None, plan: Curriculum, epochs: float, first_step: int, on: bool
    ) -> None:
        self.plan, self.epochs, self.on = plan, epochs, on
        if on:
            self.metrics = run_folder.Metrics(folder / run_folder.METRICS, first_step)
            self.board = SummaryWriter(log_dir or str(folder), purge_step=first_step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.on:
            self.metrics.close()
            self.board.close()

    def write(self, step: int, loss: float, lr: float, ledger: Ledger, result: Mapping[str, Any] | None) -> None:
        """One line: after step number `step`, the mean loss since the last line, and accuracies if there are any."""
        if not self.on:
            return
        total, epoch = ledger.total, self.plan.images_before(step + 1) / self.plan.num_images
        accuracy = {name: value for name, value in (result or {}).items() if "top" in name}
        record = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, **accuracy}
        record |= {"images": total.images, "seconds": total.seconds, "data_wait": total.data_wait}
        self.metrics.append(record)
        for name, value in record.items():
            self.board.add_scalar(f"finetune/{name}", value, step)
        log.info(
            "epoch %.1f of %g · step %d/%d · loss %.4f · lr %.2e%s · %.0f img/s · data wait %.0f%%",
            *(epoch, self.epochs, step + 1, self.plan.total_steps, loss, lr),
            "".join(f" · {name} {value:.2f}" for name, value in accuracy.items()),
            *(total.images / total.seconds, 100 * total.data_wait),
        )

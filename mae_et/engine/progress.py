"""What a person sees of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ..plan.cost import Ledger
from ..plan.curriculum import Curriculum
from ..plan.shapes import show_size
from .run_folder import METRICS, Metrics


class Recorder:
    """Says how a run goes, on the console, in metrics.jsonl and on TensorBoard. Off on all ranks but one."""

    def __init__(
        self, folder: Path, log_dir: str | None, curriculum: Curriculum, first_step: int, ledger: Ledger, on: bool
    ) -> None:
        self.curriculum, self.on, self.live = curriculum, on, on and console.is_terminal
        before = ledger.total
        self.last_images, self.last_seconds, self.last_data_seconds = before.images, before.seconds, before.data_seconds
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}% of the compute, ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("starting", total=curriculum.total_flops)
        if on:
            self.metrics = Metrics(folder / METRICS, first_step)
            self.board = SummaryWriter(log_dir or str(folder), purge_step=first_step)

    def __enter__(self) -> Recorder:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()
        if self.on:
            self.metrics.close()
            self.board.close()

    def report(
        self, step: int, index: int, loss: float, grad_norm: float, lr: float, ledger: Ledger, vanilla_flops: float
    ) -> None:
        """Record one point, after step number `step`: its gradient's norm, mean loss and rates since the last point."""
        if not self.on:
            return
        total, stage = ledger.total, self.curriculum.stages[index]
        images, seconds = total.images - self.last_images, total.seconds - self.last_seconds
        data_seconds = total.data_seconds - self.last_data_seconds
        self.last_images, self.last_seconds, self.last_data_seconds = total.images, total.seconds, total.data_seconds
        record = {
            "step": step,
            "p": self.curriculum.position(step + 1),
            "stage": index,
            "size_px": stage.size_px,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "images": total.images,
            "images_per_second": images / seconds if seconds else 0.0,
            "data_wait": data_seconds / seconds if seconds else 0.0,
            "seconds": total.seconds,
            "flops": total.flops,
            "flops_vanilla": total.images * vanilla_flops,
        }
        self.metrics.append(record)
        for name in ("loss", "grad_norm", "lr", "images_per_second", "data_wait", "flops", "p"):
            self.board.add_scalar(f"pretrain/{name}", record[name], step)
        rest = (1 - record["p"]) * self.curriculum.total_flops / total.flops * total.seconds
        line = (
            f"step {step + 1}/{self.curriculum.total_steps} · stage {index + 1}, {show_size(stage.size_px)} px · "
            f"loss {loss:.4f} · lr {lr:.2e} · {record['images_per_second']:,.0f} img/s · "
            f"data wait {record['data_wait']:.0%} · {total.flops:.2e} FLOPs, vanilla {record['flops_vanilla']:.2e}"
        )
        if self.live:
            self.bar.update(self.task, completed=total.flops, description=line)
        else:
            console.print(f"{line} · ETA {rest:,.0f} s", highlight=False, soft_wrap=True)

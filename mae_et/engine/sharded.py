"""Sharded checkpoints: each rank writes the shards it holds, and any number of ranks, or one process, reads them.

A folder `checkpoint.dcp` holds what `checkpoint.pt` would: `state.pt` with everything but the sharded tensors, in whose
places stand tensors of the meta device, and shard-*.safetensors, written and read by torch.distributed.checkpoint.
Its usual format keeps a pickle beside the shards, `.metadata`, and unpickles it: whoever writes it runs code. Shards in
safetensors need none. They have no checksums either, so `state.pt` lists the CRC-32 of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import files
from ..files import CheckpointError, CorruptCheckpoint, crc32
from . import storage
from .optim import allocate
from .runtime import Runtime

SUFFIX = ".dcp"
STATE = "state.pt"


def save(state: Mapping, folder: Path, keep: int = 1, group: dist.ProcessGroup | None = None) -> None:
    """Write nested dicts whose tensors are sharded, atomically; `keep` folders stay. All ranks call it together.

    group: of all ranks, over gloo; one of its own where another thread talks to the ranks meanwhile.
    Raises CheckpointError; the previous folder then survives.
    """
    rank, temporary = dist.get_rank(), folder.with_name(f".{folder.name}.tmp")
    if rank == 0:
        files.remove(temporary)
    dist.barrier(group)
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    with checkpoint_errors(folder, "can't be written"):
        dcp.save(_sharded(state), storage_writer=writer, process_group=group)
    mine = {file.name: crc32(file) for file in temporary.glob(f"shard-{rank + 1:05}-*.safetensors")}
    assert mine, "every rank holds a part of some matrix"
    checksums: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(checksums, mine, group)
    if rank == 0:
        unsharded = _map(state, lambda _, value: _blank(value, "meta") if isinstance(value, DTensor) else value)
        unsharded["shards"] = {name: crc for part in checksums for name, crc in part.items()}
        storage.save(unsharded, temporary / STATE)
        files.replace_folder(temporary, folder, keep)


def load(folder: Path) -> dict:
    """What :func:`save` wrote, checked, with tensors of the meta device for those in shards.

    Raises FileNotFoundError; CorruptCheckpoint if a file is missing or altered; CheckpointError if it is not one.
    """
    state = storage.load(folder / STATE)
    checksums = state.pop("shards", None)
    if not isinstance(checksums, dict):
        raise CheckpointError(f"{folder / STATE}: not of a sharded checkpoint")
    shards = {file.name: file for file in folder.glob("*.safetensors")}
    if wrong := sorted(map(str, shards.keys() ^ checksums.keys())):
        raise CorruptCheckpoint(f"{folder}: damaged: too many or too few shards: {', '.join(wrong)}")
    for name, file in shards.items():
        if crc32(file) != checksums[name]:
            raise CorruptCheckpoint(f"{folder}: damaged: the checksum of {name} is wrong")
    return state


def load_newest(path: Path) -> tuple[dict, Path]:
    """As `files.load_newest`, for :func:`restore`: of a folder, sharded tensors are still in the shards."""
    return files.load_newest(path, load if path.suffix == SUFFIX else storage.load)


def load_full(path: str | Path) -> dict:
    """A checkpoint file or folder with all its tensors, without running code. Raises as `storage.load` does."""
    path = Path(path)
    return _fill(load(path), path) if path.suffix == SUFFIX else storage.load(path)


def _fill(state: Mapping, folder: Path) -> dict:
    """What :func:`load` returned of a folder, with tensors on the CPU in place of those of the meta device."""
    tensors: dict[str, Tensor] = {}

    def fill(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta:
            value = tensors[name] = _blank(value, "cpu")
        return value

    state = _map(state, fill)
    _read(tensors, folder)
    return state


def snapshot(state: Mapping, rt: Runtime, full: bool) -> dict:
    """Nested dicts with copies of their tensors on the host, which training no longer changes. All ranks call it.

    full: rank 0 gets whole tensors in place of sharded ones, other ranks None for each tensor.
    """

    def copy(_: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if full:
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if not rt.is_main:
                return None
        return value.detach().to("cpu", non_blocking=True, copy=True)  # from CUDA, into pinned memory

    copies = _map(state, copy)
    rt.synchronize()
    return copies


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping, source: Path) -> None:
    """Put a checkpoint that was read from `source` into a model and its optimiser, whether either is sharded or not.

    A rank of a sharded model reads no more than its own part from a folder. All ranks call it together.
    """
    state = {name: state[name] for name in ("model", "optimizer")}
    from_shards = source.suffix == SUFFIX
    if _sharded(model.state_dict()):
        allocate(optimizer)
        live = _sharded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if from_shards:
            _read(live, source)

        def part(name: str, value: Any) -> Any:
            like = live.get(name)
            if like is None or from_shards:
                return value if like is None else like
            # Every rank takes its part of what all have read; none sends it to others.
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

        state = _map(state, part)
    elif from_shards:
        state = _fill(state, source)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def _read(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors in place from the shards of a folder; sharded ones on all ranks together."""
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with checkpoint_errors(folder, "can't be read"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # `alone` is meant
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def _sharded(state: Mapping) -> dict[str, DTensor]:
    """The sharded tensors in nested dicts, by the path of their keys."""
    tensors: dict[str, DTensor] = {}
    _map(state, lambda name, value: tensors.update({name: value}) if isinstance(value, DTensor) else None)
    return tensors


def _map(tree: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """Nested dicts with every value that is not a dict changed; its name is the path of its keys."""
    if isinstance(tree, Mapping):
        return {key: _map(value, change, f"{name}/{key}") for key, value in tree.items()}
    return change(name, tree)


def _blank(tensor: Tensor, device: str) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


@contextmanager
def checkpoint_errors(folder: Path, what: str) -> Iterator[None]:
    """A failure on any rank as a CheckpointError; torch's own is no Exception and holds a traceback of every rank."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0]
        raise CheckpointError(f"{folder}: {what} on rank {rank}: {reason}") from error

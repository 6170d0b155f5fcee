"""`python -m mae_et prepare SRC OUT`: pack images once into shards that are quick to read and to decode.

Images larger than needed are made smaller, everything becomes JPEG. See `data.shards` for what is written.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from ..console import console
from ..files import make_folder, write, write_text
from .config import PrepareConfig
from .decode import jpeg_objection
from .fingerprint import fingerprint
from .pixels import MODES, CorruptImage, measure_value_range, open_header, orientation_of, to_image
from .shards import FORMAT, INDEX, ShardSource
from .sources import Item, Source, open_source
from .workers import worker_options

log = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write and verify the shards of every split that there is; returns counts and bytes over all splits.

    Raises FileNotFoundError, ValueError, OSError or CheckpointError, in one line.
    """
    total = {"images": 0, "damaged": 0, "source_bytes": 0, "bytes": 0}
    value_range = config.value_range
    sources, out = {"train": open_source(config.source)}, Path(config.out)
    try:
        sources["val"] = open_source(config.source, "val")
    except FileNotFoundError as error:
        log.info("only training images: %s", error)
        if (out / "val").exists():
            raise _begun(out, f"of other images: there is {out / 'val'}, and SRC has no held-out ones") from error
    for split, source in sources.items():
        folder = out / split
        make_folder(folder, "OUT")
        if split == "train" and value_range is None:
            value_range = measure_value_range(source)
        index = pack(source, folder, replace(config, value_range=value_range))
        ShardSource(folder)  # opens as --data_path will open it
        total["images"] += sum(len(shard["keys"]) for shard in index["shards"])
        total["damaged"] += len(index["damaged"])
        for name in ("source_bytes", "bytes"):
            total[name] += sum(shard[name] for shard in index["shards"])
    return total


def pack(source: Source, folder: Path, config: PrepareConfig) -> dict[str, Any]:
    """Pack one split into `folder` and return its index. Finished shards are verified and kept."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("source", "out", "num_workers")}
    settings["value_range"] = None if config.value_range is None else [float(value) for value in config.value_range]
    settings["names_sha256"] = _names_sha256(source)
    settings["labels_sha256"] = None if source.labels is None else hashlib.sha256(source.labels.tobytes()).hexdigest()
    shards = _finished(folder, settings, source)
    first = shards[-1]["end"] if shards else 0
    encoder = Encoder(source, config)
    order = range(first, len(source))
    encoded = iter(DataLoader(encoder, None, sampler=order, **worker_options(config.num_workers)))
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{folder}", total=len(source), completed=first)
        while first < len(source):
            shard = _write_shard(folder, len(shards), first, encoded, source, config, lambda: bar.advance(task))
            # Read back before it counts: what is on the disk must be what was written.
            _verify(folder, shard)
            about = {"settings": settings, "sampled_images": _sampled_images(source, shard)}
            write_text(_sidecar(folder, shard["file"]), json.dumps(shard | about))
            shards.append(shard)
            first = shard["end"]
            if not console.is_terminal:
                log.info("%s: %d of %d images", folder / shard["file"], first, len(source))
    damaged = [entry for shard in shards for entry in shard["damaged"]]
    for name, reason in damaged:
        log.warning("damaged image skipped: %s: %s", name, reason)
    shards = [shard for shard in shards if shard["keys"]]
    if not shards:
        name, reason = damaged[0]
        raise ValueError(f"SRC {config.source}: none of its {len(source)} images can be read; {name}: {reason}")
    index = {"format": FORMAT, "classes": source.classes, "settings": settings, "damaged": damaged, "shards": shards}
    write_text(folder / INDEX, json.dumps(index))
    return index


class Encoder(Dataset):
    """Index -> (JPEG bytes, bytes it had before, label, reason if it is damaged, objection to what is decoded)."""

    def __init__(self, source: Source, config: PrepareConfig) -> None:
        self.source, self.config = source, config

    def __getitem__(self, index: int) -> tuple[bytes, int, int | None, str, str]:
        label = None if self.source.labels is None else int(self.source.labels[index])
        try:
            item, _ = self.source.read(index)
            size = len(item) if isinstance(item, bytes) else 0
            return self._encode(item), size, label, "", jpeg_objection(item)
        except (CorruptImage, OSError) as error:
            return b"", 0, label, str(error), ""

    def _encode(self, item: Item) -> bytes:
        image = to_image(item, self.config.in_chans, self.config.value_range)
        ratio = self.config.short_side / min(image.size)
        if ratio >= 1 and _is_plain_jpeg(item, self.config.in_chans):
            return item
        if ratio < 1:
            size = (max(self.config.short_side, round(side * ratio)) for side in image.size)
            image = image.resize(tuple(size), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.config.quality)
        return buffer.getvalue()


def _is_plain_jpeg(item: Item, in_chans: int) -> bool:
    """Whether bytes are already a JPEG of so many channels that needs no turning."""
    if not isinstance(item, bytes) or not item.startswith(b"\xff\xd8"):
        return False
    header = open_header(item)
    return header.mode == MODES[in_chans] and orientation_of(header) == 1


def _write_shard(
    folder: Path,
    number: int,
    first: int,
    encoded: Iterator[tuple[bytes, int, int | None, str, str]],
    source: Source,
    config: PrepareConfig,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Write images from `first` on, atomically, until the shard is full; returns its entry of the index."""
    file = f"{number:05}.tar"
    shard = {"file": file, "bytes": 0, "sha256": "", "first": first, "end": first, "source_bytes": 0}
    shard |= {"damaged": [], "keys": [], "offsets": [], "sizes": [], "labels": None if source.classes is None else []}

    def content(raw: BinaryIO) -> None:
        out = _Hashing(raw)
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            while shard["end"] < len(source) and tar.offset < config.shard_mb * 1e6:
                key = shard["end"]
                data, source_bytes, label, reason, objection = next(encoded)
                shard["end"] += 1
                advance()
                if reason:
                    shard["damaged"].append((source.name(key), reason))
                    continue
                if objection:
                    log.warning("damaged image decoded all the same: %s: %s", source.name(key), objection)
                shard["source_bytes"] += source_bytes
                shard["keys"].append(key)
                shard["offsets"].append(tar.offset + tarfile.BLOCKSIZE)
                shard["sizes"].append(len(data))
                _add(tar, f"{key:08}.jpg", data)
                if shard["labels"] is not None:
                    shard["labels"].append(label)
                    _add(tar, f"{key:08}.cls", str(label).encode())
        shard.update(bytes=raw.tell(), sha256=out.digest.hexdigest())

    write(folder / file, content)
    return shard


class _Hashing:
    """A file to write that digests on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member with nothing in its header but name and size, so that the same images give the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _finished(folder: Path, settings: dict[str, Any], source: Source) -> list[dict[str, Any]]:
    """Shards that an earlier call has completed, in order; damaged ones and all after them are written again."""
    shards: list[dict[str, Any]] = []
    while (sidecar := _sidecar(folder, f"{len(shards):05}.tar")).exists():
        try:
            shard = json.loads(sidecar.read_text())
            if not isinstance(shard, dict) or {"settings", "file", "sha256"} - shard.keys():
                raise ValueError("it is no entry of a shard")
        except ValueError as error:
            log.warning("%s is damaged (%s); writing its shard again", sidecar, error)
            break
        earlier = {"value_range": None, "labels_sha256": settings["labels_sha256"]}  # versions had no such settings
        before = earlier | shard.pop("settings")
        if before != settings:
            name = next(name for name in settings if before.get(name) != settings[name])
            other = {"names_sha256": "of other images", "labels_sha256": "of other labels"}
            raise _begun(folder.parent, other.get(name, f"with --{name} {before.get(name)}"))
        images = shard.pop("sampled_images", {})  # earlier versions have none
        now = _sampled_images(source, shard) if images else {}
        if changed := [index for index in images if now.get(index, images[index]) != images[index]]:
            raise _begun(folder.parent, f"of other images: {source.name(int(changed[0]))} has changed")
        try:
            _verify(folder, shard)
        except OSError as error:
            log.warning("%s; writing it again", error)
            break
        shards.append(shard)
    return shards


def _begun(out: Path, how: str) -> ValueError:
    return ValueError(f"OUT {out} was begun {how}; choose another folder, or remove it")


def _sampled_images(source: Source, shard: dict[str, Any]) -> dict[str, str]:
    return fingerprint(source, 64, range(shard["first"], shard["end"]))


def _verify(folder: Path, shard: dict[str, Any]) -> None:
    """OSError unless the shard's bytes are those that were written."""
    digest = hashlib.sha256()
    with open(folder / shard["file"], "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != shard["sha256"]:
        raise OSError(f"{folder / shard['file']} is not what was written")


def _sidecar(folder: Path, shard_file: str) -> Path:
    return folder / f"{shard_file}.json"


def _names_sha256(source: Source) -> str:
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.name(index).encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()

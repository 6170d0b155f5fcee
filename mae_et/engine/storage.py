"""Torch files: written atomically, checked when read, and read without running code from them.

What torch.save writes carries a CRC-32 of each of its records, which torch itself doesn't look at; it is checked here.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import http.client
import json
import logging
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..files import CheckpointError, CorruptCheckpoint, make_folder, write

log = logging.getLogger(__name__)

#: What torch raises on corrupt, cut or foreign files besides UnpicklingError (no dedicated exception type).
NOT_A_CHECKPOINT = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
#: First bytes of files that are taken for checkpoints, and what to do about them.
FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"),
    (b"\x93NUMPY", "a NumPy array (.npy); only weights of PyTorch can be read"),
    (b"\x89HDF\r\n", "an HDF5 file, of Keras or TensorFlow; only weights of PyTorch can be read"),
    (b"GGUF", "a GGUF file; only weights of PyTorch can be read"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
)
HTML = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|\?xml)", re.IGNORECASE | re.DOTALL)
#: How torch.save began its files before 1.6, after the two bytes of the pickle protocol.
LEGACY_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)[2:]
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the limit of safetensors itself
WAY_OUT = (
    "if you trust it, save its tensors alone: torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE), "
    "with .state_dict() in place of ['model'] where FILE is a whole model"
)


# ── stand-ins for what lies beside weights ──


class LeftOut:
    """Stands in for an object that isn't read: takes anything, keeps nothing, and imports nothing of its class."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _Dtype:
    """Stands in for numpy.dtype, whose own `__setstate__` trusts the file."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _number(dtype: _Dtype, raw: bytes) -> Any:
    """A NumPy scalar as a plain number."""
    plain = re.fullmatch(r"[<>=|][biufc]\d+", f"{dtype.order}{dtype.code}")
    return np.frombuffer(raw, plain[0])[0].item() if plain else LeftOut()


def _path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _value(value: Any) -> Any:
    return value


def _empty_dict(*_: object) -> dict:
    return {}


def _empty_list(*_: object) -> list:
    return []


#: Names in a pickle -> what is called in their place. The names are looked up here alone, so that nothing of the file's
#: choice is imported or called; each of these takes any argument without a side effect.
HARMLESS: dict[str, Callable] = {
    **{f"builtins.{kind.__name__}": kind for kind in (list, dict, tuple, int, float, str, bool, bytes, frozenset)},
    **{f"builtins.{kind.__name__}": kind for kind in (slice, range)},
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": argparse.Namespace,
    "collections.defaultdict": _empty_dict,
    "collections.deque": _empty_list,
    "decimal.Decimal": str,
    "uuid.UUID": LeftOut,
    **{f"datetime.{name}": getattr(datetime, name) for name in ("date", "datetime", "time", "timedelta", "timezone")},
    **{
        f"{module}.{name}": _path
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
    "numpy.dtype": _Dtype,
    "numpy.ndarray": LeftOut,
    **{
        f"numpy.{name}": LeftOut
        for name in ("bool", "bool_", "float16", "float32", "float64", "int32", "int64", "uint8")
    },
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": LeftOut for core in ("core", "_core")},
    "torch.torch_version.TorchVersion": str,
    "torchvision.transforms.functional.InterpolationMode": _value,
    "PIL.Image.Resampling": _value,
    # Configurations
    "addict.addict.Dict": OrderedDict,
    "easydict.EasyDict": OrderedDict,
    "fvcore.common.config.CfgNode": OrderedDict,
    "lightning.fabric.utilities.data.AttributeDict": OrderedDict,
    "lightning.pytorch.utilities.parsing.AttributeDict": OrderedDict,
    "lightning_fabric.utilities.data.AttributeDict": OrderedDict,
    "mmcv.utils.config.ConfigDict": OrderedDict,
    "mmengine.config.config.ConfigDict": OrderedDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": OrderedDict,
    "yacs.config.CfgNode": OrderedDict,
    "typing.Any": LeftOut,
    **{f"omegaconf.base.{name}": LeftOut for name in ("ContainerMetadata", "Metadata")},
    "omegaconf.dictconfig.DictConfig": LeftOut,
    "omegaconf.listconfig.ListConfig": LeftOut,
    **{
        f"omegaconf.nodes.{name}Node": LeftOut
        for name in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    },
}


# ── writing ──


def save(state: Mapping, path: Path, keep: int | None = 1) -> None:
    """Write plain dicts, tensors and numbers, atomically. keep: as `files.write` has it.

    Raises CheckpointError; the previous file then survives.
    """
    write(Path(path), lambda file: torch.save(state, file), keep)


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; equal content gives equal bytes.

    Raises CheckpointError; the previous file then survives.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    content = memoryview(safetensors.torch.save(tensors, {"format": "pt", **(metadata or {})}))
    length = int.from_bytes(content[:8], "little")
    # safetensors writes the metadata in random order.
    header = json.dumps(json.loads(bytes(content[8 : 8 + length])), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors are aligned to 8 bytes
    parts = len(header).to_bytes(8, "little"), header, content[8 + length :]
    write(Path(path), lambda file: file.writelines(parts))


# ── reading ──


def read(path: Path) -> tuple[dict, dict[str, str]]:
    """Content and metadata of a file of `torch.save` (no metadata) or safetensors, whatever it is called.

    Raises as :func:`load` does.
    """
    path = Path(path)
    safe = path.is_file() and (_is_safetensors(path) or (path.suffix == ".safetensors" and not _is_torch(path)))
    return load_safetensors(path) if safe else (load(path), {})


def load(path: Path) -> dict:
    """Read a file of `torch.save`, checked, without running any code from it (`weights_only=True`); or safetensors.

    Harmless objects that lie beside weights (`HARMLESS`) are let through as plain values or `LeftOut`.
    Raises FileNotFoundError; CorruptCheckpoint if the file is cut short or altered; CheckpointError if it is something
    else, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        if _is_safetensors(path):
            return load_safetensors(path)[0]
        _refuse_foreign(path)
        _verify(path)
        harmless = torch.serialization.safe_globals([(called, name) for name, called in HARMLESS.items()])
        with harmless, open(path, "rb") as file:  # of a path, torch goes by the suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(f"{path}: refused, since it could run code ({refused[1]}); {WAY_OUT}") from error
        if zipfile.is_zipfile(path):  # and its checksums are right
            reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
            raise CheckpointError(f"{path}: can't be read without running code ({reason}); {WAY_OUT}") from error
        raise CorruptCheckpoint(f"{path}: not a checkpoint of torch.save, or cut short") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except NOT_A_CHECKPOINT as error:
        raise CorruptCheckpoint(f"{path}: not a checkpoint of torch.save, or cut short") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict")
    return content


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises CheckpointError if it is cut short or something else."""
    try:
        if not _is_safetensors(path):
            _refuse_foreign(path)
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CorruptCheckpoint(f"{path}: not a safetensors file, or cut short") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error


def local_file(source: str | Path) -> Path | None:
    """The file at an address http(s)://…, downloaded once into the checkpoint folder of torch.hub; None for a path.

    Raises ValueError on another kind of address; CheckpointError if there is no network, or no checkpoint there.
    """
    if not (scheme := re.match(r"([a-z][a-z0-9+.-]+)://", str(source), re.IGNORECASE)):
        return None
    url = str(source)
    if scheme[1].lower() not in ("http", "https"):
        raise ValueError(f"{url}: only http:// and https:// can be downloaded: copy it here and give its path")
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2]).lstrip(".") or "checkpoint"
    # Many addresses end alike (pytorch_model.bin): each has a folder, so that none is taken for another.
    folder = Path(torch.hub.get_dir()) / "checkpoints" / hashlib.sha256(url.encode()).hexdigest()[:12]
    path = folder / name
    if path.exists():
        return path
    make_folder(folder)
    log.info("downloading %s to %s", url, path)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        reason = str(getattr(error, "reason", error)).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{url}: can't be downloaded ({reason}); put the file at {path}") from error
    try:
        read(path)
    except CorruptCheckpoint as error:  # a download that broke off ends without an error
        path.unlink()
        raise CheckpointError(f"{url}: what was downloaded is {str(error).removeprefix(f'{path}: ')}") from error
    except CheckpointError as error:
        path.unlink()
        raise CheckpointError(f"{url}: {str(error).removeprefix(f'{path}: ')}") from error
    return path


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: with the length of a JSON header, and `{`."""
    head = _head(path, 9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MAX_SAFETENSORS_HEADER


def _is_torch(path: Path) -> bool:
    head = _head(path, 2 + len(LEGACY_MAGIC))
    return head.startswith(b"PK\3\4") or head[2:] == LEGACY_MAGIC


def _head(path: Path, length: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(length)


def _refuse_foreign(path: Path) -> None:
    """CheckpointError that says what a file is that begins neither as torch's nor as safetensors."""
    head = _head(path, 512)
    if not head:
        raise CorruptCheckpoint(f"{path}: is empty (0 bytes), or cut short")
    if _is_torch(path):
        return
    what = next((what for start, what in FOREIGN if head.startswith(start)), None)
    if HTML.match(head):
        what = "an HTML page, such as one to log in, not the file itself: download it again"
    elif head[257:262] == b"ustar":
        what = "a tar archive: unpack it first"
    elif head[:1] == b"\x80" and len(head) > 2 + len(LEGACY_MAGIC) and head[1] <= pickle.HIGHEST_PROTOCOL:
        what = f"a pickle, but not of torch.save, and can't be read without running code; {WAY_OUT}"
    elif what is None and len(head) > 8 and (text := re.match(rb"[\t\r\n\x20-\x7e]+\Z", head)):
        what = f"text that begins with {text[0].decode().strip()[:40]!r}, not a checkpoint"
    if what:
        raise CheckpointError(f"{path}: is {what}")


def _verify(path: Path) -> None:
    """CorruptCheckpoint unless every record of a zip file has its checksum; torch.save never compresses any."""
    if _head(path, 4) != b"PK\3\4":
        return  # the format before torch 1.6 has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_foreign_zip(path, archive.namelist())
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(f"{path}: refused: its records are compressed, as torch.save never does")
            wrong = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise CorruptCheckpoint(
            f"{path}: not a checkpoint of torch.save, or cut short: it begins as one, but its end is missing"
        ) from error
    if wrong:
        raise CorruptCheckpoint(f"{path}: damaged: the checksum of its record {wrong} is wrong")


def _refuse_foreign_zip(path: Path, names: list[str]) -> None:
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(
            f"{path}: is a NumPy archive (.npz), as JAX projects publish; timm reads those of ViTs: "
            "torch.save(timm.create_model(NAME, checkpoint_path=FILE).state_dict(), NEW_FILE)"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path}: is a TorchScript program, which runs code; if you trust it, save its tensors alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    if names and not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(f"{path}: is a zip archive (first: {names[0]}), not a checkpoint: unpack it first")

"""The Hugging Face hub, and timm's names for what lies there: `hf-hub:ORG/NAME[@REVISION]`, `local-dir:FOLDER`."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from .files import CheckpointError

log = logging.getLogger(__name__)

HUB, LOCAL = "hf-hub:", "local-dir:"
#: All that a folder of weights may hold here: neither code of others is fetched, nor files beside an export sent.
FILES = (
    *("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin"),
    *("decoder/model.safetensors", "README.md"),
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def local_folder(source: str | Path) -> Path | None:
    """The folder behind `hf-hub:…`, downloaded once into the hub's cache, or `local-dir:…`; None for anything else.

    Raises ValueError for what is no name of a repository; CheckpointError if it can't be had.
    """
    text = str(source).replace("hf_hub:", HUB, 1)  # timm takes both
    if text.startswith(LOCAL):
        return Path(text.removeprefix(LOCAL))
    if not text.startswith(HUB):
        return None
    check_repository(text, text.removeprefix(HUB))
    name, _, revision = text.removeprefix(HUB).partition("@")
    import huggingface_hub  # half a second, and only needed here

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(FILES)))
    except _errors() as error:
        raise CheckpointError(f"{text}: can't be downloaded ({_reason(error)})") from error


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to a model repository, which is made if it isn't there; returns its address.

    Raises CheckpointError, in one line, if the hub refuses or can't be reached: the folder is there all the same.
    """
    import huggingface_hub

    try:
        name = huggingface_hub.create_repo(repository, repo_type="model", exist_ok=True).repo_id
        # A decoder of an earlier export belongs to other weights.
        others = None if (folder / "decoder" / "model.safetensors").exists() else ["decoder/*"]
        huggingface_hub.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(FILES), delete_patterns=others
        )
    except _errors() as error:
        raise CheckpointError(f"--push {repository}: {_reason(error)}; {folder} is written") from error
    return f"{HUB}{name}"


def check_repository(flag: str, name: str) -> None:
    """ValueError unless this is ORG/NAME, perhaps with a revision."""
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(f"{flag}: a repository on the hub is ORG/NAME")


def _errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises. Its base is that of the library for HTTP, which has changed with its versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError)


def _reason(error: Exception) -> str:
    """The first line that says something: the client's messages are paragraphs."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

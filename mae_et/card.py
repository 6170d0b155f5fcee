"""The model card of exported weights: what they are, how to load them, and what their run folder says of them.

Files of the run are quoted as they are; what they don't say, the card doesn't either. Paths of the machine are left
out. No torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .engine import run_folder
from .plan.config import PretrainConfig
from .plan.cost import Ledger
from .plan.flags import from_dict, names, to_dict
from .plan.shapes import ModelShape, SizePx, as_size, height_width, show_size
from .record import WeightsRecord, to_timm

log = logging.getLogger(__name__)

UNKNOWN_LICENSE = "unknown"
"""The hub's word for weights of which nobody has said it."""
OURS = "<!-- Written by mae_et's export, which writes it anew. Remove this line to keep what you change. -->"
"""The last line of a card."""
#: Evaluations by their protocol, for people.
PROTOCOLS = {
    "finetune": "fine-tuning",
    "finetuned": "the fine-tuned classifier",
    "knn": "kNN",
    "linear_probe": "linear probe",
    "linear_probe_augmented": "linear probe, augmented as in the paper",
}


def model_card(
    name: str,
    shape: ModelShape,
    facts: WeightsRecord,
    outputs: int,
    decoder: bool,
    run: Path | None,
    license: str,
    step: int | None = None,
    unfinished: str = "",
) -> str:
    """README.md of a folder that timm loads.

    name: what `timm.create_model` takes. outputs: of the classifier, 0 without one. run: the run folder, if the weights
    are a run's. license: an identifier of the hub, or "". step: that they are of; costs and evaluations of others are
    left out. unfinished: the same in words, if it is not the run's last.
    """
    config = _config(run)
    title = run.resolve().name if run and name.startswith("local-dir:") else name.replace(":", "/").rpartition("/")[2]
    parts = [
        _front_matter(license, outputs, config),
        _what(title, shape, outputs, config, unfinished),
        _use(name, shape, outputs),
    ]
    if decoder:
        parts.append(_decoder(name))
    parts.append(_images(shape, facts, outputs))
    if run is not None:
        step = step if step is not None else _told(run / run_folder.LEDGER, _steps) or None
        parts += [_training(run, config, step) if config else "", _evaluations(run, config, shape, step)]
    parts += [_license(license), OURS + "\n"]
    return "\n".join(part for part in parts if part)


def _front_matter(license: str, outputs: int, config: PretrainConfig | None) -> str:
    about: dict[str, Any] = {
        "license": license or UNKNOWN_LICENSE,
        "library_name": "timm",
        "pipeline_tag": "image-classification" if outputs else "image-feature-extraction",
        "tags": ["timm", "mae_et", "masked-autoencoder", "self-supervised"],
    }
    if config is not None and config.data_path.lower().startswith("hfds/"):
        about["datasets"] = [config.data_path.partition("/")[2].partition(":")[0]]
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n"


def _what(title: str, shape: ModelShape, outputs: int, config: PretrainConfig | None, unfinished: str) -> str:
    size = f"{shape.depth} blocks of width {shape.embed_dim}, {shape.num_heads} heads, patches of {shape.patch_size} px"
    kind = f"classifier of {outputs} classes" if outputs else "encoder, without a classifier"
    how = ""
    if config is not None:
        target = "HOG" if config.target == "hog" else "normalised pixels" if config.norm_pix_loss else "pixels"
        curriculum = "vanilla MAE" if config.curriculum == "vanilla" else f"curriculum {config.curriculum}"
        how = f" It was pretrained as a masked autoencoder that predicts {target} ({curriculum})."
    if unfinished:
        how += f" These are weights of {unfinished}, before the end of that run."
    return f"# {title}\n\nA plain ViT ({size}): {kind}.{how} Made with mae_et.\n"


def _use(name: str, shape: ModelShape, outputs: int) -> str:
    result = (
        f"logits = model(images)  # [1, {outputs}]"
        if outputs
        else f"features = model(images)  # [1, {shape.embed_dim}]"
    )
    colours, (height, width) = {1: "L", 3: "RGB"}.get(shape.in_chans), height_width(shape.img_size)
    load = f"""transform = timm.data.create_transform(**config, is_training=False)
images = transform(Image.open("image.jpg").convert("{colours}"))[None]"""
    if colours is None:  # no picture of Pillow
        load = f"images = torch.zeros(1, {shape.in_chans}, {height}, {width})  # yours, normalised as below"
    return f"""## Use

```python
import timm
{"from PIL import Image" if colours else "import torch"}

model = timm.create_model("{name}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)  # size, mean, std, interpolation and crop of this model
{load}
{result}
tokens = model.forward_features(images)  # [1, 1 + {shape.num_patches}, {shape.embed_dim}]: class token, patches
```

To fine-tune or judge it with mae_et: `python main_finetune.py --finetune {name} --data_path IMAGES` (`--knn`,
`--linear_probe`).
"""


def _decoder(name: str) -> str:
    return f"""`decoder/model.safetensors` is the decoder of pretraining, which timm doesn't need. In Python:
`mae_et.checkpoint.read_pretrained("{name}")`.
"""


def _images(shape: ModelShape, facts: WeightsRecord, outputs: int) -> str:
    cfg = to_timm(facts, shape, outputs)
    rows = {
        "size": f"{show_size(shape.img_size)} px, {shape.in_chans} channels",
        "mean": _numbers(cfg["mean"]),
        "std": _numbers(cfg["std"]),
        "interpolation": cfg["interpolation"],
        "centre crop": f"{cfg['crop_pct']:g} of the resized image",
    }
    if facts.value_range:
        rows["range of values"] = f"{_numbers(facts.value_range)} become 0 and 1, before mean and std"
    return "## Images\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in rows.items())


def _training(run: Path, config: PretrainConfig, step: int | None) -> str:
    text = f"## Pretraining\n\n- Data: {_data_name(config.data_path)}"
    text += _told(run / run_folder.ENVIRONMENT, _environment) or "\n"
    text += _told(run / run_folder.LEDGER, partial(_costs, step=step))
    # Roles say what a model depends on; the rest is where and how a run ran.
    defaults = to_dict(PretrainConfig())
    told = names(PretrainConfig, lambda role: role.name not in ("run", "images"))
    changed = {name: value for name, value in to_dict(config).items() if name in told and value != defaults[name]}
    recipe = f"Recipe `{Path(config.recipe).stem}`, w" if config.recipe else "W"
    listing = yaml.safe_dump(changed, sort_keys=False, default_flow_style=None, width=100)
    return text + f"\n{recipe}hat differs from the defaults of `main_pretrain.py`:\n\n```yaml\n{listing}```\n"


def _environment(text: str) -> str:
    facts = json.loads(text)
    count = f", {facts['num_images']:,} images" if facts.get("num_images") else ""
    versions = {"mae_et": facts.get("mae_et"), "revision": facts.get("git")} | facts["packages"]
    listing = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{count}\n- On {facts['device']}\n- {listing}\n"


def _steps(text: str) -> int:
    return Ledger.from_state_dict(json.loads(text)).total.steps


def _costs(text: str, step: int | None) -> str:
    ledger = Ledger.from_state_dict(json.loads(text))
    if step is not None and ledger.total.steps > step:
        return ""  # of later weights
    table = "\n| stage | steps | images | training FLOPs | seconds |\n|---|---|---|---|---|\n"
    for label, cost in [*((f"{_show(c.size_px)} px", c) for c in ledger.stages), ("total", ledger.total)]:
        table += f"| {label} | {cost.steps:,} | {cost.images:,} | {cost.flops:.3g} | {cost.seconds:,.0f} |\n"
    return table


def _evaluations(run: Path, config: PretrainConfig | None, shape: ModelShape, step: int | None) -> str:
    rows = [
        _told(path, partial(_evaluation, name=path.name, config=config, shape=shape, step=step))
        for path in sorted(run.glob("eval-*.json"))
    ]
    if not any(rows):
        return "## Evaluation\n\nNone is recorded in the run folder.\n"
    return "## Evaluation\n\n| protocol | top-1 | held-out images |\n|---|---|---|\n" + "".join(rows)


def _evaluation(text: str, name: str, config: PretrainConfig | None, shape: ModelShape, step: int | None) -> str:
    """Its rows; with the images, where they are not the test images of the pretraining's data.

    "" for one of weights of another step than `step`; older results don't say theirs.
    """
    found = json.loads(text)
    if "top1" not in found:
        return ""
    judged = found.get("step", step)
    if config is None and found["protocol"].partition("-")[0] == "finetune":  # `step` is what it began with
        judged = found.get("training", {}).get("steps", step)
    if step is not None and judged != step:
        whose = "of other weights" if judged is None else f"of the weights after step {judged:,}, not {step:,}"
        log.warning("%s is %s, and left out of the model card", name, whose)
        return ""
    flags = found.get("flags") or {}
    protocol = PROTOCOLS.get(found["protocol"].partition("-")[0], found["protocol"])
    probes = flags.get("knn") or flags.get("linear_probe")
    if probes and flags.get("global_pool"):
        protocol += " of the mean patch token"
    if probes and (block := max(flags.get("layers") or [shape.depth])) != shape.depth:
        protocol += f" of block {block}"
    if (size := found.get("input_size", shape.img_size)) not in (shape.img_size, list(height_width(shape.img_size))):
        protocol += f" at {_show(size)} px"
    if labels := flags.get("train_images"):
        protocol += f", {labels:,} labels"
    data = flags.get("data_path") or ""
    if data and (config is None or data.rstrip("/") != config.data_path.rstrip("/")):
        protocol += f", on {_data_name(data)}"
    if holdout := flags.get("holdout"):
        protocol += f", on training images kept out (--holdout {holdout})"
    images = f"{found.get('num_images', 0):,}"
    rows = f"| {protocol} | {found['top1']:.2f} % | {images} |\n"
    if "corrupted_top1" in found:
        rows += f"| {protocol}, corrupted images | {found['corrupted_top1']:.2f} % | {images} |\n"
    return rows


def _license(license: str) -> str:
    if license and license != UNKNOWN_LICENSE:
        return f"## Licence\n\n{license}\n"
    return "## Licence\n\nNot stated. The images that a model was trained on may limit its use.\n"


def _config(run: Path | None) -> PretrainConfig | None:
    """Of the run, even where it was written by another version with other flags; None for one of fine-tuning."""
    return None if run is None else _told(run / run_folder.CONFIG, _pretraining) or None


def _pretraining(text: str) -> PretrainConfig | None:
    values = yaml.safe_load(text) or {}
    if "curriculum" not in values:
        return None
    known = PretrainConfig.__dataclass_fields__
    return from_dict(PretrainConfig, {k: v for k, v in values.items() if k in known}, "flags")


def _data_name(data_path: str) -> str:
    """The name of a data set; of a path only its last part."""
    kind = data_path.partition("/")[0].lower()
    if kind in ("hfds", "torch"):
        return data_path.partition(":")[0]
    return Path(data_path).name


def _show(size_px: SizePx | list[int]) -> str:
    """Of a ledger's file, which knows no tuples."""
    return show_size(size_px if isinstance(size_px, int) else as_size(size_px))


def _numbers(values: Any) -> str:
    return " ".join(f"{value:g}" for value in values)


def _told(path: Path, words: Callable[[str], Any]) -> Any:
    """What a file of the run says, in words; "" where there is none, and, with a warning, where it is damaged."""
    if not path.is_file():
        return ""
    try:
        return words(path.read_text())
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        log.warning("%s is damaged or of another program, and left out of the model card: %r", path, error)
        return ""

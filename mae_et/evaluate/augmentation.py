"""Augmentation of fine-tuning: what happens to a crop, and mixup, CutMix and label smoothing for any batch.

B batch · C channels · K classes.
"""

from __future__ import annotations

import logging
import re

import torch
from timm.data import Mixup, create_transform
from torch import Tensor

from ..data.labelled import Augmentation
from .config import RAND_AUGMENT, FinetuneConfig

log = logging.getLogger(__name__)

#: What timm's policies may look like; it leaves out parts that it doesn't know.
POLICY = re.compile(r"(rand|augmix)(-t\w+|-(mstd|mmax|inc|m|n|p|w|d|a|b)[\d.]+)*|(original|v0|3a)r?(-mstd[\d.]+)?")


def mixing(config: FinetuneConfig, num_classes: int) -> Mixup:
    """timm's Mixup and CutMix as configured; it also makes the smoothed targets where nothing is mixed."""
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def mixed(mix: Mixup, images: Tensor, labels: Tensor, enabled: bool = True) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] mixed in pairs, and soft targets [B, K]. Of an odd number, one image stays as it is."""
    parts, even = [], len(images) - len(images) % 2
    for rows, pairs in ((slice(0, even), True), (slice(even, None), False)):
        image, label = images[rows], labels[rows]
        if len(image):
            mix.mixup_enabled = enabled and pairs
            single = 1 + (len(image) % 2)  # Mixup wants even numbers
            image, target = mix(image.repeat(single, 1, 1, 1), label.repeat(single))
            parts.append((image[::single], target[::single]))
    return torch.cat([image for image, _ in parts]), torch.cat([target for _, target in parts])


def augmentation(config: FinetuneConfig, channels: int) -> Augmentation:
    """What the flags ask for. Policies need colours that a picture can have: 1 or 3 channels."""
    policy = "" if config.aa in ("", "none", "None") else config.aa or RAND_AUGMENT
    if channels not in (1, 3):
        if (config.aa and policy) or config.color_jitter:
            raise ValueError(f"--aa and --color_jitter need 1 or 3 channels, not {channels}; leave them out")
        log.warning("%d channels: trained without RandAugment, which needs 1 or 3", channels)
        policy = ""
    if policy and not _is_policy(policy):
        raise ValueError(
            f"--aa {policy}: not a policy of timm; for example {RAND_AUGMENT}, original, v0, augmix or none"
        )
    return Augmentation(config.crop_scale, policy, config.color_jitter, config.reprob, config.remode, config.recount)


def _is_policy(policy: str) -> bool:
    """Whether timm makes something of all its parts."""
    try:
        create_transform(8, is_training=True, auto_augment=policy)
    except (AssertionError, ValueError):  # an unknown name or part, a number that is none
        return False
    return bool(POLICY.fullmatch(policy))

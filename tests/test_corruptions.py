"""Common corruptions: each kind does what its number says, and results of evaluations list them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import write_run
from scipy.ndimage import gaussian_filter
from skimage.data import astronaut
from tiny import QUICK
from torchvision.transforms.v2.functional import jpeg

from mae_et.compare.runs import read_run
from mae_et.data.corruptions import CORRUPTIONS, STRENGTHS, CommonCorruption
from mae_et.evaluate import probe as probe_module
from mae_et.evaluate.config import FinetuneConfig
from mae_et.evaluate.finetune import finetune
from mae_et.evaluate.probe import probe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.tensor(astronaut()[:224, 100:324]).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize("kind", STRENGTHS)
def test_every_strength_damages_a_photograph_more_than_the_one_before(kind: str, photo: torch.Tensor) -> None:
    errors = [(CommonCorruption(kind, n)(photo, 0).double() - photo.double()).square().mean() for n in range(1, 6)]
    assert errors[0] > 1 and errors == sorted(errors) and len(set(errors)) == 5


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 48), (4, 32, 32), (3, 4, 4)])
def test_images_of_any_shape_stay_what_they_are(corruption: CommonCorruption, shape: tuple[int, ...]) -> None:
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    before = image.clone()
    damaged = corruption(image, 1)
    assert damaged.dtype == torch.uint8 and damaged.shape == shape
    assert torch.equal(image, before)


@pytest.mark.parametrize("kind", ["jpeg", "pixelate", "blur", "contrast"])
def test_channels_that_are_no_colours_are_corrupted_one_by_one(kind: str, photo: torch.Tensor) -> None:
    image, corruption = torch.cat([photo, photo[:1].flip(1)]), CommonCorruption(kind, 3)
    assert torch.equal(corruption(image, 0), torch.cat([corruption(channel, 0) for channel in image.split(1)]))


@pytest.mark.parametrize("strength", [1, 5])
def test_noise_has_its_standard_deviation_and_is_a_function_of_the_images_number(strength: int) -> None:
    grey = torch.full((3, 96, 96), 127, dtype=torch.uint8)
    noise, sigma = CommonCorruption("noise", strength), STRENGTHS["noise"][strength - 1]
    wanted = np.clip(127 + 255 * sigma * np.random.default_rng(0).normal(size=10**6), 0, 255).std()
    assert noise(grey, 7).double().std().item() == pytest.approx(wanted, rel=0.02)
    torch.manual_seed(1)
    first = noise(grey, 7)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # the global generator is left alone
    assert torch.equal(noise(grey, 7), first) and not torch.equal(noise(grey, 8), first)


@pytest.mark.parametrize(("strength", "side"), [(1, 224), (4, 224), (3, 112)])
def test_blur_is_scipys_gaussian_filter_scaled_to_the_image(strength: int, side: int, photo: torch.Tensor) -> None:
    image = photo[:, :side, :side].contiguous()
    sigma = STRENGTHS["blur"][strength - 1] * side / 224
    wanted = np.stack([gaussian_filter(c.astype(float), sigma, mode="mirror", truncate=4) for c in image.numpy()])
    assert np.abs(CommonCorruption("blur", strength)(image, 0).numpy() - wanted).max() <= 1


def test_contrast_keeps_the_mean_and_the_given_share(photo: torch.Tensor) -> None:
    damaged = CommonCorruption("contrast", 3)(photo, 0).double()
    torch.testing.assert_close(damaged.mean((1, 2)), photo.double().mean((1, 2)), atol=0.1, rtol=0)
    torch.testing.assert_close(damaged.std((1, 2)), 0.2 * photo.double().std((1, 2)), atol=0.1, rtol=0)


def test_jpeg_is_torchvisions_at_the_same_quality(photo: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of an encoder that will move elsewhere
        wanted = jpeg(photo, 10).double()
    assert (CommonCorruption("jpeg", 4)(photo, 0).double() - wanted).abs().mean() < 1


def test_pixelation_leaves_so_many_rows_and_columns(photo: torch.Tensor) -> None:
    damaged = CommonCorruption("pixelate", 5)(photo, 0)
    for axis in (1, 2):
        assert len(torch.unique_consecutive(damaged, dim=axis).movedim(axis, 0)) == 56  # a quarter of 224


def test_probes_and_eval_list_the_corruptions_and_compare_reads_their_mean(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    finetune(FinetuneConfig(**QUICK | {"finetune": str(run), "epochs": 1}))
    folder = run / "finetune"
    plain = probe(FinetuneConfig(**QUICK | {"finetune": str(run), "knn": True}))["knn"]
    plain_flops = json.loads((run / "eval-knn.json").read_text())["cost"]["flops"]
    monkeypatch.setattr(CommonCorruption, "__call__", lambda self, image, number: torch.zeros_like(image))
    extracted, real = [], probe_module.extract
    monkeypatch.setattr(probe_module, "extract", lambda *arguments: extracted.append(1) or real(*arguments))
    probe(FinetuneConfig(**QUICK | {"finetune": str(run), "knn": True, "linear_probe": True, "corruptions": True}))
    assert len(extracted) == 2 + 25  # both protocols share the features, of corrupted images too
    probe(
        FinetuneConfig(
            **QUICK
            | {"finetune": str(run), "linear_probe": True, "features": "augmented", "epochs": 2, "corruptions": True}
        )
    )
    finetune(FinetuneConfig(**QUICK | {"finetune": str(folder), "eval": True, "corruptions": True, "epochs": None}))
    results = [run / f"eval-{name}.json" for name in ("knn", "linear_probe", "linear_probe_augmented")]
    for path in (*results, folder / "eval-finetuned.json"):
        result = json.loads(path.read_text())
        assert {kind: len(values) for kind, values in result["corruptions"].items()} == dict.fromkeys(STRENGTHS, 5)
        every = [value for values in result["corruptions"].values() for value in values]
        assert result["corrupted_top1"] == pytest.approx(np.mean(every))
        assert every == pytest.approx([100 / 3] * 25)  # blank images are all taken for one of three classes
        assert result["num_images"] == 12
    knn, linear = (json.loads(path.read_text()) for path in results[:2])
    assert knn["cost"]["flops"] == pytest.approx(plain_flops * (24 + 26 * 12) / (24 + 12))  # 24 to train, 12 held out
    assert linear["cost"]["flops"] == 0  # costs add up
    assert knn["top1"] == plain["top1"]  # of the images as they are
    study_run = write_run(tmp_path / "study_run")
    shutil.copy(results[0], study_run)
    evaluations = read_run(study_run).evaluations
    assert evaluations["knn"]["top1"] == knn["top1"]
    assert evaluations["knn-corrupted"]["top1"] == knn["corrupted_top1"]

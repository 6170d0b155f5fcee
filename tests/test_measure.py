"""`measure`: its figures are those of the pixels, for every kind of --data_path, and what it proposes runs."""

from __future__ import annotations

import json
import shlex
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et import cli
from mae_et.data import measure as measuring
from mae_et.data.config import PrepareConfig
from mae_et.data.measure import Proposal, describe, measure, proposals
from mae_et.data.prepare import prepare
from mae_et.plan.config import PretrainConfig
from mae_et.plan.flags import parse


def report_of(capsys: pytest.CaptureFixture, data_path: str | Path) -> dict:
    """What `measure --json` prints."""
    cli.main(["measure", str(data_path), "--json"])
    return json.loads(capsys.readouterr().out)


def statistics(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std per channel of [H, W, C] arrays in [0, 1], from all pixels of images of one size."""
    pixels = np.concatenate([image.reshape(-1, image.shape[2]) for image in images])
    return pixels.mean(0), pixels.std(0)


def test_figures_of_class_folders_their_tar_their_shards_and_their_webdataset(pictures, tmp_path, capsys):
    """The same images in every container: the same figures, which numpy finds too."""
    images = [np.asarray(Image.open(path)) / 255 for path in sorted((pictures / "train").rglob("*.png"))]
    mean, std = statistics(images)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(pictures / "train", arcname=".")
    prepare(PrepareConfig(str(pictures), str(tmp_path / "packed"), quality=95, num_workers=0))
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((pictures / "train").rglob("*.png"))):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    kinds = {
        pictures: (3, 12, "PNG"),
        flat: (None, None, "PNG"),
        tmp_path / "train.tar": (3, None, "PNG"),
        tmp_path / "packed": (3, 12, "JPEG"),
        f"wds/{tmp_path}/packed/train": (None, None, "JPEG"),
    }
    for data_path, (classes, held_out, format_name) in kinds.items():
        report = report_of(capsys, data_path)
        assert (report["images"], report["measured"], report["held_out"]) == (24, 24, held_out), data_path
        assert report["classes"] in (classes, 3) and report["formats"] == {format_name: 24}, data_path
        assert report["height_px"] == {"smallest": 20, "median": 20, "largest": 20}
        assert report["width_px"]["median"] == 28 and report["short_side_px"]["median"] == 20
        tolerance = 1e-4 if format_name == "PNG" else 0.03  # JPEG smooths noise
        np.testing.assert_allclose(report["mean"], mean, atol=tolerance)
        np.testing.assert_allclose(report["std"], std, atol=tolerance)
        assert not report["corrupt"] and report["pixel_types"] == {"uint8": 24}


def test_the_mnist_family_is_grey_and_gets_its_recipe(tmp_path):
    images = np.random.default_rng(0).integers(0, 200, (50, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        data = b"\0\0\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(data)
    report = measure(str(tmp_path))
    assert (report["formats"], report["in_chans"], report["held_out"]) == ({"array": 50}, 1, 50)
    np.testing.assert_allclose(
        [report["mean"], report["std"]], [[images.mean() / 255], [images.std() / 255]], atol=1e-4
    )
    (proposal,) = report["proposals"]
    assert proposal["recipe"] == "fashion_mnist_etpp" and float(proposal["flags"]["mean"]) == report["mean"][0]
    large = describe(report | {"short_side_px": report["short_side_px"] | {"median": 600}})
    assert f"  python -m mae_et prepare {tmp_path} PACKED --in_chans 1" in large, "grey images stay grey"


def test_corrupt_files_are_named_grey_ones_count_as_colour_and_each_image_the_same(tmp_path):
    grey, colour = np.full((10, 10), 51, np.uint8), np.full((40, 30, 3), (255, 0, 102), np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    report = measure(str(tmp_path))
    assert report["channels"] == {"1": 1, "3": 1} and report["in_chans"] == 3
    np.testing.assert_allclose(report["mean"], np.mean([[0.2] * 3, [1, 0, 0.4]], axis=0), atol=1e-3)
    np.testing.assert_allclose(report["std"], [0.4, 0.1, 0.1], atol=1e-3)
    assert report["short_side_px"] == {"smallest": 10, "median": 20, "largest": 30}
    assert [Path(one["name"]).name for one in report["corrupt"]] == ["broken.png"]
    text = "\n".join(describe(report))
    assert "broken.png: not a readable image" in text and "--damaged_limit 0.67" in text
    (tmp_path / "grey.png").unlink(), (tmp_path / "colour.png").unlink()
    with pytest.raises(ValueError, match=r"none of 1 images can be read; .*broken\.png"):
        measure(str(tmp_path))


def test_deep_arrays_get_their_channels_and_range(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", (100 + 3900 * rng.random((60, 70, 5)) ** 3).astype(np.uint16))
    np.save(tmp_path / "odd.npy", np.zeros((60, 70, 2), np.uint8))
    report = measure(str(tmp_path))
    assert report["in_chans"] == 5 and report["other_channels"] == 1 and report["formats"] == {"npy": 7}
    low, high = report["value_range"]
    assert 99 < low < 102 and 3950 < high < 4000  # quantiles, of a sample of the pixels
    stored = np.concatenate([np.load(tmp_path / f"{i}.npy").reshape(-1, 5) for i in range(6)])
    scaled = ((stored - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(report["mean"], scaled.mean(0), atol=2e-3)
    np.testing.assert_allclose(report["std"], scaled.std(0), atol=2e-3)
    flags = report["proposals"][0]["flags"]
    assert (
        flags["in_chans"] == "5" and len(flags["mean"].split()) == 5 and flags["value_range"].split()[0] == f"{low:g}"
    )
    assert float(flags["damaged_limit"]) >= 2 / 7, "the run stops above it"


def test_values_are_those_that_are_finite(tmp_path):
    tiles = [np.linspace(low, 300, 100, dtype=np.float32).reshape(10, 10) for low in (100, 200)]
    tiles[0][0, 0], tiles[1][0, 0] = np.inf, np.nan
    for i, tile in enumerate([*tiles, np.full_like(tiles[0], np.nan)]):
        np.save(tmp_path / f"{i}.npy", tile)
    report = measure(str(tmp_path))
    low, high = report["values"]
    assert 100 < low < 103 and high == 300
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert f"float32 3; {low:g} to 300" in "\n".join(describe(report))
    assert "float32 3; none of them finite" in "\n".join(describe(report | {"values": None}))


def test_of_many_images_a_sample_is_measured_and_that_is_said(monkeypatch):
    monkeypatch.setattr(measuring, "MAX_MEASURED", 40)
    report = measure("photos")
    assert (report["images"], report["measured"], report["classes"]) == (3264, 40, 17)
    assert "measured   40 of them, spread evenly" in describe(report)
    assert report["channels"]["1"] == pytest.approx(40 * 7 / 17, abs=2), "7 of the 17 photographs are grey"


FOUND = {"in_chans": 3, "mean": [0.5] * 3, "std": [0.2] * 3, "value_range": None, "corrupt": [], "other_channels": 0}


@pytest.mark.parametrize(
    ("short_side", "images"), [(28, 5000), (47, 50_000), (90, 30), (375, 300), (375, 200_000), (375, 3_000_000)]
)
def test_proposals_parse_and_last_as_long_as_is_said(short_side, images):
    from mae_et.plan.build import build_curriculum

    found = FOUND | {"short_side_px": {"median": short_side}, "images": images, "measured": min(images, 2000)}
    first, *others = proposals(found)
    assert len(others) == (short_side >= 160)
    for proposal in (first, *others):
        config = parse(PretrainConfig, proposal.arguments("some/where"))
        plan = build_curriculum(config, images, devices=1)
        assert config.mean is None or config.mean == (0.5, 0.5, 0.5)
        assert (config.data_path, config.output_dir) == ("some/where", "runs/where")
        assert config.warmup_epochs / config.epochs == pytest.approx(0.1, rel=0.05)
        if config.input_size == 224:
            assert plan.total_steps >= 0.95 * measuring.MIN_STEPS or images >= 100 * config.total_batch_size
        else:
            assert (config.input_size, config.patch_size) == ((32, 2) if short_side < 48 else (64, 4)), "16×16 patches"
            assert config.epochs * images == pytest.approx(measuring.PHOTOS * 10, rel=0.05)


def test_statistics_near_the_default_are_left_at_it():
    found = FOUND | {"short_side_px": {"median": 90}, "images": 3264, "measured": 3264}
    near = {"mean": [0.47, 0.46, 0.42], "std": [0.24, 0.23, 0.22]}
    assert proposals(found | near)[0].flags == {}
    assert proposals(found)[0].flags == {"mean": "0.5 0.5 0.5", "std": "0.2 0.2 0.2"}
    assert "std" not in proposals(found | {"std": [0.0] * 3})[0].flags, "nothing can be divided by it"


def test_the_run_folder_lies_outside_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = Proposal("", "demo", {}).arguments(".")
    assert parse(PretrainConfig, arguments).output_dir == str(tmp_path.parent / f"{tmp_path.name}-run")
    pattern = Proposal("", "demo", {}).arguments("wds/data/imagenet-{000..146}.tar")
    assert parse(PretrainConfig, pattern).output_dir == "runs/imagenet-000-146-tar"


def test_the_proposed_command_trains(tmp_path, monkeypatch, capsys):
    """As it is printed, but for a smaller model and fewer epochs: deep arrays of five channels, one of them damaged."""
    data, rng = tmp_path / "my data", np.random.default_rng(0)
    data.mkdir()
    for i in range(12):
        np.save(data / f"{i:02}.npy", rng.integers(100, 4000, (60, 70, 5), dtype=np.uint16))
    (data / "07.npy").write_bytes(b"\x93NUMPY broken")
    monkeypatch.chdir(tmp_path)
    report = report_of(capsys, data)
    command = shlex.split(report["proposals"][0]["command"])
    assert command[:2] == ["python", "main_pretrain.py"]
    smaller = (
        "--depth 1 --embed_dim 24 --num_heads 2 --decoder_embed_dim 16 --decoder_depth 1 --epochs 2 --batch_size 4"
    )
    cli.main_pretrain([*command[2:], *smaller.split(), "--warmup_epochs", "1", "--num_workers", "0", "--device", "cpu"])
    run = tmp_path / "runs" / "my-data"
    assert (run / "encoder.safetensors").is_file()
    assert "damaged image skipped (1 so far)" in capsys.readouterr().out


def test_an_empty_path_is_not_this_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("0.png")
    with pytest.raises(SystemExit):
        cli.main(["measure", ""])
    assert "error: DATA is empty; give a folder" in capsys.readouterr().err

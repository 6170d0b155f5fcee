"""Export for timm and the hub: the folder loads in plain timm, its card says what is known, and it comes back."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from run_folders import write_run
from tiny import QUICK, SHAPE

from mae_et import checkpoint, cli, hub
from mae_et.checkpoint import read_pretrained, write_export
from mae_et.engine import run_folder
from mae_et.evaluate.config import FinetuneConfig
from mae_et.evaluate.encoder import load_encoder
from mae_et.evaluate.finetune import finetune
from mae_et.files import CheckpointError
from mae_et.model import MaskedAutoencoder

TASK = {"norm_pix_loss": True}


@pytest.fixture
def trained(run: Path, tmp_path: Path) -> Path:
    """A run folder with weights, and with what a run says of itself."""
    told = write_run(
        tmp_path / "told", top1=12.345, data_path=str(tmp_path / "secret" / "my images"), mask_ratio=0.6, **TASK
    )
    evaluated = json.loads((told / "eval-knn.json").read_text())
    flags = evaluated["flags"] | {"global_pool": True, "train_images": 100}
    changed = {"protocol": "knn-mean-100", "flags": flags, "top1": 23.456, "corrupted_top1": 7.0}
    (told / "eval-knn-mean-100.json").write_text(json.dumps(evaluated | changed))
    for path in told.iterdir():
        shutil.copy(path, run / path.name)
    return run


class FakeHub:
    """The three functions of huggingface_hub that are used, on a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name in ("create_repo", "upload_folder", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def create_repo(self, repo_id: str, *, repo_type: str, exist_ok: bool) -> huggingface_hub.RepoUrl:
        assert repo_type == "model" and exist_ok
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], delete_patterns: list[str] | None
    ) -> None:
        for path in (p for pattern in delete_patterns or () for p in (self.folder / repo_id).glob(pattern)):
            path.unlink()
        self._copy(Path(folder_path), self.folder / repo_id, allow_patterns)

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        cache = self.folder / "cache" / repo_id / (revision or "main")
        self._copy(self.folder / repo_id, cache, allow_patterns)
        return str(cache)

    def _copy(self, source: Path, target: Path, patterns: list[str]) -> None:
        for path in (p for p in source.rglob("*") if p.is_file()):
            place = path.relative_to(source)
            if any(fnmatch.fnmatch(str(place), pattern) for pattern in patterns):
                (target / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / place)


def test_the_exported_folder_gives_in_plain_timm_what_the_run_gives_here(trained):
    cli.main(["export", str(trained)])
    folder = trained / "timm"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        *("README.md", "config.json", "decoder/model.safetensors", "model.safetensors")
    ]
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(theirs)
    assert [*config["mean"], *config["std"]] == [0.4, 0.5, 0.6, 0.2, 0.3, 0.4]
    assert (tuple(config["input_size"]), config["interpolation"], config["crop_pct"]) == ((3, 16, 16), "bicubic", 1.0)
    weights = read_pretrained(trained)
    ours = MaskedAutoencoder(**weights.shape).eval()
    ours.load_state_dict(weights.state)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(images), ours.encode(images), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theirs(images), ours.encode(images)[:, 0], rtol=1e-5, atol=1e-6)
    whole = read_pretrained(f"local-dir:{folder}")
    assert (whole.has_decoder, whole.target, whole.norm_pix_loss) == (True, "pixel", False)
    assert whole.shape == weights.shape and whole.state.keys() == weights.state.keys()
    assert all(torch.equal(whole.state[key], weights.state[key]) for key in whole.state)
    assert not read_pretrained(folder, encoder_only=True).has_decoder

    cli.main(["export", str(trained), "--encoder_only"])
    assert not (folder / "decoder" / "model.safetensors").exists(), "of the export before"
    assert not read_pretrained(folder).has_decoder


def test_the_card_says_what_the_run_says_and_no_path_of_the_machine(trained, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    cli.main(["export", str(trained), "--out", str(folder), "--license", "cc-by-nc-4.0"])
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-nc-4.0", "timm")
    assert card.data.pipeline_tag == "image-feature-extraction"
    text = card.content
    assert "| total | 10 | 640 | 1e+12 | 100 |" in text, "the ledger"
    assert "| kNN | 12.35 % | 500 |" in text, "the evaluation"
    assert "| kNN of the mean patch token, 100 labels | 23.46 % | 500 |" in text
    assert "| kNN of the mean patch token, 100 labels, corrupted images | 7.00 % | 500 |" in text
    assert "- Data: my images, 1,000 images" in text and "mean | 0.4 0.5 0.6 |" in text
    assert str(tmp_path / "secret") not in text and str(trained) not in text
    environment = json.loads((trained / "environment.json").read_text())
    assert f"\n- On {environment['device']}\n" in text and "that predicts normalised pixels (" in text
    listed = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert listed == {"input_size": 32, "patch_size": 8, "epochs": 4.0, "mask_ratio": 0.6, **TASK}

    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], found)  # how to load it, as it stands there
    assert found["features"].shape == (1, 16) and found["tokens"].shape == (1, 5, 16)

    cli.main(["export", str(trained), "--out", str(folder)])
    assert huggingface_hub.ModelCard.load(folder / "README.md").data.license == "unknown"
    own = text.replace("<!--", "").replace("cc-by-nc-4.0", "mit")
    (folder / "README.md").write_text(own)
    cli.main(["export", str(trained), "--out", str(folder)])
    assert (folder / "README.md").read_text() == own
    assert "left as it is" in " ".join(capsys.readouterr().out.split())


def test_the_card_names_images_that_are_not_the_test_images_of_the_pretraining(trained, tmp_path):
    told = json.loads((trained / "eval-knn.json").read_text())
    for name, flags in (("same", {"data_path": f"{tmp_path}/secret/my images/"}), ("kept", {"holdout": 9}),
                        ("other", {"data_path": f"{tmp_path}/other", "holdout": 7})):  # fmt: skip
        result = told | {"top1": len(name), "num_images": 9, "flags": told["flags"] | flags}
        (trained / f"eval-{name}.json").write_text(json.dumps(result))
    cli.main(["export", str(trained), "--out", str(tmp_path / "model")])
    text = (tmp_path / "model/README.md").read_text()
    assert "| kNN, on training images kept out (--holdout 9) | 4.00 % | 9 |" in text
    assert "| kNN, on other, on training images kept out (--holdout 7) | 5.00 % | 9 |" in text
    assert text.count("| kNN | ") == 2 and str(tmp_path) not in text


@pytest.mark.parametrize(
    ("name", "text", "lost"),
    [
        ("eval-knn.json", '{"top1": 1.0', "| kNN | "),
        ("eval-knn.json", '{"top1": 50.0}', "| kNN | "),
        ("eval-knn.json", "7", "| kNN | "),
        ("eval-knn.json", '{"protocol": "knn", "top1": "x"}', "| kNN | "),
        ("eval-knn.json", '{"protocol": "knn", "top1": 1.0, "flags": [1]}', "| kNN | "),
        ("environment.json", "", "- On "),
        ("environment.json", '{"device": "cpu"}', "- On "),
        ("ledger.json", "", "| total |"),
        ("ledger.json", '{"stages": [{"size": 3}]}', "| total |"),
        ("config.yaml", "curriculum: [", "## Pretraining"),
        ("config.yaml", "curriculum: et_ppp", "## Pretraining"),
    ],
)
def test_a_damaged_file_of_the_run_is_left_out_of_the_card_and_named(trained, tmp_path, capsys, name, text, lost):
    cli.main(["export", str(trained), "--out", str(tmp_path / "whole")])
    assert lost in (tmp_path / "whole/README.md").read_text() and "left out" not in capsys.readouterr().out
    (trained / name).write_text(text)
    cli.main(["export", str(trained), "--out", str(tmp_path / "model")])
    card = (tmp_path / "model/README.md").read_text()
    assert lost not in card and "## Evaluation" in card and (tmp_path / "model/model.safetensors").exists()
    said = "".join(capsys.readouterr().out.split())
    assert f"{trained}/{name}isdamagedorofanotherprogram,andleftoutofthemodelcard" in said


def test_the_card_has_no_figures_of_other_weights(trained, tmp_path, capsys):
    """Such as of an evaluation on the way, of a run that went on."""
    told = json.loads((trained / "eval-knn.json").read_text())
    steps = run_folder.read_ledger(trained).total.steps
    found = {"early": {"step": steps - 1, "top1": 7.77}, "late": {"step": steps, "top1": 8.88}}
    found |= {"older": {"top1": 9.99}, "foreign": {"step": None, "top1": 6.66}}
    for name, changes in found.items():
        (trained / f"eval-{name}.json").write_text(json.dumps({k: told[k] for k in told if k != "step"} | changes))
    cli.main(["export", str(trained), "--out", str(tmp_path / "model")])
    card = (tmp_path / "model/README.md").read_text()
    assert "8.88" in card and "9.99" in card and "7.77" not in card and "6.66" not in card
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"eval-early.json is of the weights after step {steps - 1}, not {steps}, and left out of the model card" in said
    )
    assert "eval-foreign.json is of other weights, and left out" in said


def test_the_card_of_a_fine_tuned_model_has_its_own_figures(run, tmp_path):
    """Fine-tuning's result names the step that it began with, which is none of its own."""
    state = checkpoint.load(run / "checkpoint.pt") | {"step": 77}
    checkpoint.save(state, run / "checkpoint.pt")
    top1 = json.loads(finetune(FinetuneConfig(finetune=str(run), **QUICK)).read_text())["top1"]
    finetune(FinetuneConfig(finetune=str(run / "finetune"), eval=True, **QUICK | {"epochs": None}))
    cli.main(["export", str(run / "finetune"), "--out", str(tmp_path / "model")])
    card = (tmp_path / "model/README.md").read_text()
    for what in ("fine-tuning", "the fine-tuned classifier"):
        assert re.search(rf"\| {what}, on pictures\d+ \| {top1:.2f} % \|", card)


def test_a_card_names_the_folder_that_is_meant_by_a_dot(trained, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    cli.main(["export", str(trained), "--out", "."])
    assert 'timm.create_model("local-dir:mine"' in (tmp_path / "mine/README.md").read_text()


def test_heads_that_the_weights_contradict_are_refused(trained, tmp_path, capsys):
    heads = read_pretrained(trained).shape.num_heads
    cli.main(["export", str(trained), "--out", str(tmp_path / "same"), "--num_heads", str(heads)])
    with pytest.raises(SystemExit):
        cli.main(["export", str(trained), "--out", str(tmp_path / "model"), "--num_heads", str(2 * heads)])
    assert f"--num_heads {2 * heads}: {trained} has {heads}; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_weights_without_a_run_get_a_card_too(trained, tmp_path):
    lonely = tmp_path / "elsewhere" / "checkpoint.pt"
    lonely.parent.mkdir()
    shutil.copy(trained / "checkpoint.pt", lonely)
    cli.main(["export", str(lonely), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Use" in text and "## Pretraining" not in text and "## Evaluation" not in text


@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_code_of_the_card_takes_grey_and_colour_pictures(in_chans, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = MaskedAutoencoder(**SHAPE | {"in_chans": in_chans})
    write_export(model.state_dict(), model.shape, "timm", Path("out"))
    Image.new(mode, (40, 20)).save("image.jpg")
    found: dict = {}
    exec(re.search(r"```python\n(.*?)```", Path("out/README.md").read_text(), re.DOTALL)[1], found)
    assert found["images"].shape == (1, in_chans, 16, 16) and found["features"].shape == (1, 16)


def test_what_is_pushed_is_fine_tuned_from_the_hub(trained, tmp_path, monkeypatch, capsys):
    there = FakeHub(tmp_path / "hub", monkeypatch)
    (trained / "timm").mkdir()
    (trained / "timm" / "private.txt").write_text("no part of an export")
    cli.main(["export", str(trained), "--push", "me/mae-tiny"])
    assert "-> hf-hub:me/mae-tiny" in capsys.readouterr().out
    assert not (there.folder / "me" / "mae-tiny" / "private.txt").exists()
    assert 'timm.create_model("hf-hub:me/mae-tiny", pretrained=True)' in (trained / "timm" / "README.md").read_text()
    for name in ("hf-hub:me/mae-tiny", "hf_hub:me/mae-tiny@v1.0", f"local-dir:{trained / 'timm'}"):
        encoder = load_encoder(FinetuneConfig(finetune=name, data_path="D"))
        assert (encoder.record.mean, encoder.input_size) == ((0.4, 0.5, 0.6), 16), name
        assert encoder.state.keys() == {k for k in read_pretrained(trained).state if k.startswith("encoder.")}
    for file in ("model.safetensors", "decoder/model.safetensors"):
        assert (there.folder / "cache" / "me" / "mae-tiny" / "v1.0" / file).is_file()
    cli.main(["export", str(trained), "--push", "me/mae-tiny", "--encoder_only"])
    pushed = there.folder / "me" / "mae-tiny"
    left = {str(path.relative_to(pushed)) for path in pushed.rglob("*") if path.is_file()}
    assert left == {"README.md", "config.json", "model.safetensors"}, "a decoder of another export"


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(trained, tmp_path, monkeypatch, capsys):
    there = FakeHub(tmp_path / "hub", monkeypatch)
    unreachable = HfHubHTTPError.__bases__[0]("no route to host\nand more")

    def fail(*_args, **_kwargs) -> None:
        raise unreachable

    monkeypatch.setattr(huggingface_hub, "upload_folder", fail)
    with pytest.raises(SystemExit):
        cli.main(["export", str(trained), "--push", "me/mae"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--push me/mae: no route to host; " in error and "is written" in error
    assert json.loads((trained / "timm" / "config.json").read_text())["architecture"] == "vit_base_patch16_224"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^hf-hub:me/mae: can't be downloaded \(no route to host\)$"):
        read_pretrained("hf-hub:me/mae")
    assert there.folder.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push", "mae"], "--push mae: a repository on the hub is ORG/NAME"),
        (["--push", "me/mae", "--format", "facebook"], "--push uploads the folder of --format timm"),
        (["--push", "me/mae", "--out", "x.safetensors"], "--push uploads the folder of --format timm"),
    ],
)
def test_what_can_not_be_pushed_is_refused_before_anything_is_read(flags, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "no/such/run", *flags])
    assert message in capsys.readouterr().err


def test_names_on_the_hub():
    assert hub.local_folder("runs/mine") is None and hub.local_folder("vit_base_patch16_224.mae") is None
    assert hub.local_folder("local-dir:runs/mine") == Path("runs/mine")
    for name in ("hf-hub:mae", "hf-hub:a/b/c", "hf-hub:../x/y"):
        with pytest.raises(ValueError, match=r"a repository on the hub is ORG/NAME"):
            hub.local_folder(name)


@pytest.mark.parametrize(
    ("format", "out", "written"),
    [
        ("timm", "e.pt", "a folder, or a .safetensors file"),
        ("huggingface", "e.safetensors", "a folder"),
        ("facebook", "e.bin", "a .pth file"),
    ],
)
def test_a_file_of_another_kind_is_refused(format, out, written, run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), "--format", format, "--out", str(tmp_path / out)])
    assert f"{out}: --format {format} writes {written};" in capsys.readouterr().err

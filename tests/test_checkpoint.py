"""Files survive a failed write, never run code when read, and weights are read from wherever they come."""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from pathlib import Path

import pytest
import timm
import torch

from mae_et import checkpoint, interop
from mae_et.checkpoint import Pretrained, load, read_pretrained, save, save_safetensors, write_export
from mae_et.evaluate.config import FinetuneConfig
from mae_et.evaluate.encoder import load_encoder
from mae_et.files import CheckpointError
from mae_et.model import MaskedAutoencoder

SHAPE = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 192,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 16,
    "mlp_ratio": 4.0,
    "target_dim": 192,
}
ENCODER_SHAPE = {
    key: SHAPE[key] for key in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
} | {"mlp_ratio": 4.0}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MaskedAutoencoder(**SHAPE).state_dict()


def own(state: dict, **overrides) -> dict:
    """A checkpoint as a run writes it."""
    return {
        "format": "mae_et/1",
        "model": state,
        "shape": dict(SHAPE),
        "target": "pixel",
        "norm_pix_loss": True,
        "step": 7,
    } | overrides


def assert_pretrained(found: Pretrained, wanted: dict, shape: dict, has_decoder: bool) -> None:
    assert set(found.state) == set(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(found.state[key], tensor), key
    assert (found.shape, found.has_decoder) == (shape, has_decoder)
    model = MaskedAutoencoder(**found.shape)
    assert model.load_state_dict(found.state, strict=has_decoder).unexpected_keys == []


def one_line(error: pytest.ExceptionInfo, *words: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


# Writing


def test_save_and_load_give_the_same(tmp_path):
    content = own({"w": torch.arange(6.0).view(2, 3)}, nested={"numbers": [1, 2.5, None, True], "text": "é"})
    save(content, tmp_path / "checkpoint.pt")
    found = load(tmp_path / "checkpoint.pt")
    assert torch.equal(found["model"].pop("w"), content["model"].pop("w"))
    assert found == content
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


WRITERS = {
    "torch": lambda value, path: save({"w": torch.full((9,), value)}, path),
    "safetensors": lambda value, path: save_safetensors({"w": torch.full((9,), value)}, path, {"note": "x"}),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_previous_file(writer, failing, tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    WRITERS[writer](1.0, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, fail)
        with pytest.raises(CheckpointError) as error:
            WRITERS[writer](2.0, path)
    one_line(error, path, "No space left on device")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    WRITERS[writer](2.0, path)
    assert path.read_bytes() != before


def test_what_is_renamed_was_forced_to_disk_first(tmp_path, monkeypatch):
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name, call in real.items():
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: (calls.append(name), call(*args)))
    save({"w": 1}, tmp_path / "file.pt")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its new name, the folder


def test_content_that_cannot_be_saved_leaves_the_previous_file(tmp_path):
    path = tmp_path / "file.pt"
    save({"w": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        save({"w": lambda: 0}, path)
    assert load(path) == {"w": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError) as error:
        save({"w": 1}, tmp_path / "missing" / "file.pt")
    one_line(error, tmp_path / "missing" / "file.pt", "No such file or directory")


def test_a_full_disk_leaves_the_previous_file(tmp_path):
    # A real limit on the size of a file: torch.save hides the operating system's error behind its own.
    resource = pytest.importorskip("resource")
    path = tmp_path / "file.pt"
    save({"w": 1}, path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, unlimited[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            save({"w": torch.ones(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    one_line(error, path, "File too large")
    assert load(path) == {"w": 1}
    assert list(tmp_path.iterdir()) == [path]


# Reading


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    save(own({"w": torch.randn(300)}), tmp_path / "whole.pt")
    save_safetensors({"w": torch.randn(300)}, tmp_path / "whole.safetensors")
    torch.save({"w": torch.randn(30)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for whole, read in (("whole.pt", load), ("legacy.pt", load), ("whole.safetensors", read_pretrained)):
        content = (tmp_path / whole).read_bytes()
        cut = tmp_path / f"cut-{whole}"
        for length in {0, 1, 3, 4, 5, 30, 64, *range(100, len(content), 97), *range(len(content) - 30, len(content))}:
            cut.write_bytes(content[:length])
            with pytest.raises(CheckpointError) as error:
                read(cut)
            one_line(error, cut)


def test_foreign_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "text.pt").write_text("not a checkpoint\n" * 20)
    (tmp_path / "noise.pt").write_bytes(torch.randint(0, 256, (500,), dtype=torch.uint8).numpy().tobytes())
    torch.save([1, 2], tmp_path / "list.pt")
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(CheckpointError) as error:
            load(file)
        one_line(error, file)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt: no such file"):
        load(tmp_path / "nothing.pt")


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_reading_never_runs_code(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"model": Malicious(marker)}, tmp_path / "zip.pt")
    torch.save({"model": Malicious(marker)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for file in ("zip.pt", "legacy.pt"):
        for read in (load, read_pretrained):
            with pytest.raises(CheckpointError) as error:
                read(tmp_path / file)
            one_line(error, tmp_path / file, "could run code", "mkdir")
            assert not marker.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert marker.exists()  # the file was a real attack


# Pretrained weights


def test_reads_our_checkpoints_and_run_folders(state, tmp_path):
    save(own(state), tmp_path / "checkpoint.pt")
    save_safetensors(interop.to_timm(state), tmp_path / "encoder.safetensors", {"mae_et": json.dumps(SHAPE)})
    for source in (tmp_path, str(tmp_path), tmp_path / "checkpoint.pt"):
        found = read_pretrained(source)
        assert_pretrained(found, state, SHAPE, has_decoder=True)
        assert (found.norm_pix_loss, found.target) == (True, "pixel")
        assert found.origin == f"mae_et checkpoint {tmp_path / 'checkpoint.pt'}"
    found = read_pretrained(tmp_path, encoder_only=True)
    assert_pretrained(found, interop.encoder_only(state), SHAPE, has_decoder=False)

    (tmp_path / "checkpoint.pt").unlink()
    for source in (tmp_path, tmp_path / "encoder.safetensors"):
        found = read_pretrained(source)
        assert_pretrained(found, interop.encoder_only(state), SHAPE, has_decoder=False)
        assert found.origin == f"mae_et encoder {tmp_path / 'encoder.safetensors'}"

    save(own(state, format="mae_et/2"), tmp_path / "newer.pt")
    with pytest.raises(CheckpointError) as error:
        read_pretrained(tmp_path / "newer.pt")
    one_line(error, tmp_path / "newer.pt", "mae_et/2", "mae_et/1")


@pytest.fixture
def run(state, tmp_path) -> Path:
    """A run folder with two checkpoints, the newest of which is cut short; the older one has other weights."""
    (tmp_path / "config.yaml").touch()
    older = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    for number, weights in enumerate((older, state)):
        save(own(weights, step=number, config={"data_path": "D"}), tmp_path / "checkpoint.pt", keep=2)
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    return tmp_path


@pytest.mark.parametrize("newest", ["damaged", "missing"])
@pytest.mark.parametrize("by", ["folder", "file"])
def test_weights_come_from_the_checkpoint_before_a_damaged_one(newest, by, run, caplog):
    path, before = run / "checkpoint.pt", run / "checkpoint.prev1.pt"
    if newest == "missing":
        path.unlink()
    found = read_pretrained(run if by == "folder" else path)
    assert (found.origin, found.training["step"]) == (f"mae_et checkpoint {before}", 0)
    (record,) = caplog.records
    assert str(path) in record.getMessage() and str(before) in record.getMessage()


def test_an_intact_encoder_is_read_whatever_its_checkpoints_are(state, run, caplog):
    encoder, wanted = run / "encoder.safetensors", interop.encoder_only(state)
    save_safetensors(interop.to_timm(state), encoder, {"mae_et": json.dumps(SHAPE), "mae_et_record": "{}"})
    for source in (run, encoder):
        found = read_pretrained(source, encoder_only=True)
        assert_pretrained(found, wanted, SHAPE, has_decoder=False)
        assert found.training["config"] == {"data_path": "D"}, "known from the older checkpoint"
    assert read_pretrained(run).has_decoder, "only the older checkpoint has one"
    (run / "checkpoint.prev1.pt").write_bytes(b"")
    for source, encoder_only in ((run, True), (run, False), (encoder, False)):
        caplog.clear()
        found = read_pretrained(source, encoder_only)
        assert_pretrained(found, wanted, SHAPE, has_decoder=False)
        assert not found.training
        assert f"its end is missing; only what {encoder} says of itself is known" in caplog.text
    encoder.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: .*cut short"):
        read_pretrained(run)


def test_stored_shape_wins_over_what_weights_tell(tmp_path):
    shape = SHAPE | {"embed_dim": 48, "img_size": (16, 40), "num_heads": 4}  # 4 heads can't be guessed
    state = MaskedAutoencoder(**shape).state_dict()
    write_export(state, shape, "timm", tmp_path / "encoder.safetensors")
    assert read_pretrained(tmp_path / "encoder.safetensors").shape == shape
    torch.save(interop.to_timm(state), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare\.pth: num_heads of width 48"):
        read_pretrained(tmp_path / "bare.pth")


def test_reads_facebook_checkpoints(state, tmp_path):
    theirs, path = interop.to_facebook(state), tmp_path / "mae.pth"
    args = argparse.Namespace(norm_pix_loss=True, model="mae_vit_tiny_patch8", lr=None)
    torch.save({"model": theirs, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": args}, path)
    found = read_pretrained(path)
    assert_pretrained(found, state, SHAPE, has_decoder=True)
    assert (found.norm_pix_loss, found.target) == (True, "pixel")
    assert found.origin == f"facebookresearch/mae checkpoint {path}"

    torch.save({"model": theirs}, path)  # as released: no arguments
    assert_pretrained(read_pretrained(path), state, SHAPE, has_decoder=True)
    assert read_pretrained(path).norm_pix_loss is None

    encoder = interop.to_timm(state)
    head = {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    pooled = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: t for key, t in encoder.items()}
    for content in (encoder, encoder | head, pooled | head):
        torch.save({"model": content, "args": args}, path)
        found = read_pretrained(path)
        assert_pretrained(found, interop.encoder_only(state), ENCODER_SHAPE, has_decoder=False)
        assert (found.norm_pix_loss, found.target) == (None, None)

    other = theirs | {"decoder_pos_embed": torch.zeros_like(theirs["decoder_pos_embed"])}
    torch.save({"model": other}, path)
    with pytest.raises(ValueError, match="sin-cos") as error:
        read_pretrained(path)
    one_line(error, path)
    found = read_pretrained(path, encoder_only=True)
    assert_pretrained(found, interop.encoder_only(state), ENCODER_SHAPE, has_decoder=False)


def test_reads_timm_encoders(state, tmp_path):
    encoder = interop.to_timm(state)
    torch.save(encoder, tmp_path / "bare.pth")
    torch.save({"state_dict": encoder, "arch": "vit", "epoch": 3}, tmp_path / "trained.pth.tar")
    save_safetensors(encoder | {"head.weight": torch.zeros(5, 192)}, tmp_path / "model.safetensors")
    for file in ("bare.pth", "trained.pth.tar", "model.safetensors"):
        found = read_pretrained(tmp_path / file)
        assert_pretrained(found, interop.encoder_only(state), ENCODER_SHAPE, has_decoder=False)


@pytest.mark.parametrize("by", ["our export", "safetensors", "bin"])
def test_reads_huggingface_folders(by, state, tmp_path):
    if by == "our export":
        write_export(state, SHAPE, "huggingface", tmp_path, norm_pix_loss=True)
    else:
        (tmp_path / "config.json").write_text(json.dumps(interop.huggingface_config(SHAPE, norm_pix_loss=True)))
        theirs = interop.to_huggingface(state, naming="transformers5_file")
        if by == "bin":
            torch.save(theirs, tmp_path / "pytorch_model.bin")
        else:
            save_safetensors(theirs, tmp_path / "model.safetensors")
    weights = next(file for file in tmp_path.iterdir() if file.name != "config.json")
    for source in (tmp_path, weights):
        found = read_pretrained(source)
        assert_pretrained(found, state, SHAPE, has_decoder=True)
        assert (found.norm_pix_loss, found.target) == (True, "pixel")
        assert found.origin == f"transformers ViTMAE folder {tmp_path}"
    assert not read_pretrained(tmp_path, encoder_only=True).has_decoder

    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        read_pretrained(weights)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"config\.json: .*'bert'"):
        read_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        read_pretrained(tmp_path)


def test_reads_timm_models_by_name(monkeypatch):
    create, asked = timm.create_model, []

    def without_network(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", without_network)
    found = read_pretrained("vit_tiny_patch16_224")
    assert asked == [False, True]  # refused or accepted before anything is downloaded
    shape = ENCODER_SHAPE | {"img_size": 224, "patch_size": 16, "depth": 12}
    assert_pretrained(found, found.state, shape, has_decoder=False)
    assert found.origin == "timm model vit_tiny_patch16_224"

    for name in ("resnet18", "vit_small_patch14_dinov2", "flexivit_small", "vit_tiny_patch16_224.nonsense"):
        asked.clear()
        with pytest.raises(ValueError, match=f"timm model {name}: ") as error:
            read_pretrained(name)
        one_line(error)
        assert True not in asked


def test_no_network_is_one_line(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("Please check your connection.\nAnd more")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError) as error:
        read_pretrained("vit_tiny_patch16_224")
    one_line(error, "vit_tiny_patch16_224", "Please check your connection.")


def test_what_is_nothing_known_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_pretrained(tmp_path / "missing.pth")
    one_line(error, tmp_path / "missing.pth", "run folder", ".safetensors", "facebookresearch/mae", "timm model")
    with pytest.raises(FileNotFoundError) as error:
        read_pretrained(tmp_path)
    one_line(error, tmp_path, "checkpoint.pt", "config.json")
    save({"step": 3}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_pretrained(tmp_path / "numbers.pt")
    save({"model": timm.create_model("resnet18").state_dict()}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"missing \(first: .*unexpected \(first: ") as error:
        read_pretrained(tmp_path / "resnet.pth")
    one_line(error, tmp_path / "resnet.pth")


# Exports


@pytest.mark.parametrize("format", checkpoint.EXPORT_FORMATS)
def test_exports_are_read_back(format, state, tmp_path):
    out = tmp_path / "new" / "folder" / {"timm": "x.safetensors", "facebook": "x.pth", "huggingface": "x"}[format]
    write_export(state, SHAPE, format, out)
    full = format != "timm"
    assert_pretrained(read_pretrained(out), state if full else interop.encoder_only(state), SHAPE, has_decoder=full)

    write_export(Pretrained(state, SHAPE, True, "test", True, "pixel"), SHAPE, format, out, encoder_only=True)
    found = read_pretrained(out)
    assert not found.has_decoder
    for key, tensor in interop.encoder_only(state).items():
        assert torch.equal(found.state[key], tensor)


@pytest.mark.parametrize("format", checkpoint.EXPORT_FORMATS)
@pytest.mark.parametrize(("width", "heads"), [(64, 4), (48, 3)])
def test_exports_keep_heads_that_weights_do_not_tell(format, width, heads, tmp_path):
    """A wrong number would load as well, and compute something else."""
    shape = SHAPE | {"embed_dim": width, "num_heads": heads, "decoder_num_heads": 8}
    out = tmp_path / {"timm": "x.safetensors", "facebook": "x.pth", "huggingface": "x"}[format]
    write_export(MaskedAutoencoder(**shape).state_dict(), shape, format, out)
    found = read_pretrained(out, encoder_only=True).shape
    assert (found["embed_dim"], found["num_heads"]) == (width, heads)
    if format != "timm":
        assert read_pretrained(out).shape["decoder_num_heads"] == 8


def test_heads_that_a_file_does_not_tell_are_asked_for_or_said(tmp_path, caplog):
    for width, path in ((64, tmp_path / "64.pth"), (48, tmp_path / "48.pth")):
        shape = SHAPE | {"embed_dim": width, "num_heads": 4}
        torch.save(interop.to_timm(MaskedAutoencoder(**shape).state_dict()), path)
        assert read_pretrained(path, num_heads=4).shape["num_heads"] == 4
    assert not caplog.text
    assert read_pretrained(tmp_path / "64.pth").shape["num_heads"] == 1
    assert "taken to be 1, of 64 each; see --num_heads" in caplog.text
    start = load_encoder(FinetuneConfig(finetune=str(tmp_path / "64.pth"), data_path="there", num_heads=4))
    assert start.shape["num_heads"] == 4
    with pytest.raises(ValueError, match=r"48\.pth: num_heads of width 48 can't be told .* \(--num_heads\)"):
        load_encoder(FinetuneConfig(finetune=str(tmp_path / "48.pth"), data_path="there"))


def test_a_shape_may_leave_out_defaults(state, tmp_path):
    brief = {key: SHAPE[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    save(own(state, shape=brief), tmp_path / "checkpoint.pt")
    pretrained = read_pretrained(tmp_path)
    assert_pretrained(pretrained, state, SHAPE, has_decoder=True)
    write_export(pretrained, brief, "huggingface", tmp_path / "folder")
    found = read_pretrained(tmp_path / "folder")
    assert_pretrained(found, state, SHAPE, has_decoder=True)
    assert found.norm_pix_loss is True


def test_exports_say_what_is_wrong(state, tmp_path):
    with pytest.raises(ValueError, match="choose from timm, facebook, huggingface"):
        write_export(state, SHAPE, "onnx", tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="can't be created"):
        write_export(state, SHAPE, "huggingface", tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]

"""Recipes and flags: each shipped recipe is sound, YAML loses nothing, and mistakes get one clear line."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et.plan.build import build_curriculum, shape_of
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import StageRow
from mae_et.plan.flags import from_dict, from_recipe, parse, recipes, to_dict, to_yaml
from mae_et.plan.report import PlanConfig
from mae_et.plan.shapes import MODELS

DATA = ("--data_path", "D")


def flags(*argv: str) -> PretrainConfig:
    return parse(PretrainConfig, list(argv), default_recipe="demo")


def read_back(config: PretrainConfig) -> PretrainConfig:
    return from_dict(type(config), yaml.safe_load(to_yaml(config)), where="test")


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name", recipes())
def test_a_shipped_recipe_is_sound(name):
    text = recipes()[name].read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert text.startswith(header)
    for field in ("Source", "Command", "Hardware", "Cost", "Expected"):
        assert re.search(rf"^# {field}: +\S.{{9,}}", header, flags=re.MULTILINE), f"{field}: is missing in the header"
    assert len(header.splitlines()[0]) > 20
    assert f"--recipe {name}" in header or name == "demo"

    config = from_recipe(PretrainConfig, name)
    assert config.recipe == name
    assert config == flags("--recipe", name)
    assert read_back(config) == config
    assert shape_of(config).num_parameters > 1000
    plan = build_curriculum(config, config.num_images or 3000)
    assert all(stage.steps > 1 for stage in plan.stages)
    assert plan.stages[-1].size_px == config.input_size
    assert plan.total_images > 0.9 * config.epochs * plan.num_images
    assert len(plan.stages) == {"vanilla": 1, "et": 3, "et_pp": 3}[config.curriculum]
    for other in re.findall(r"--(?:recipe|vs) (\w+)", header):
        assert other in recipes()


def test_a_recipe_gives_the_defaults_and_flags_overrule_it():
    demo = from_recipe(PretrainConfig, "demo")
    assert flags() == demo
    assert flags("--recipe", "demo", "--epochs", "3", "--curriculum=vanilla") == replace(
        demo, epochs=3.0, curriculum="vanilla"
    )
    assert flags("--epochs", "3") == replace(demo, epochs=3.0)
    plain = flags(*DATA)
    assert plain == PretrainConfig(data_path="D")
    assert (plain.curriculum, plain.model, plain.epochs, plain.mask_ratio) == (
        "vanilla",
        "mae_vit_large_patch16",
        400,
        0.75,
    )


def test_of_two_recipes_the_last_one_counts():
    assert flags("--recipe", "demo", "--recipe=in1k_vitb_mae1600") == flags("--recipe", "in1k_vitb_mae1600")
    with pytest.raises(ValueError, match="nope"):
        flags("--recipe", "demo", "--recipe", "nope")


def test_a_file_is_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: mae_vit_tiny_patch16\ncurriculum: custom\nshare_of: epochs\nepochs: 1e1\nwarmup_epochs: 1\nblr: 1e-3\n"
        "stages:\n- {size_px: 96, share: 0.5, mask_ratio: 0.6}\n- {size_px: [224, 160], share: 0.5, batch_size: 32}\n"
        "input_size: [224, 160]\n"
    )
    config = flags("--recipe", str(path))
    assert (config.epochs, config.blr, config.input_size) == (10.0, 1e-3, (224, 160))
    assert config.stages == (StageRow(96, 0.5, mask_ratio=0.6), StageRow((224, 160), 0.5, batch_size=32))
    assert read_back(config) == config
    plan = build_curriculum(config, 1000)
    assert [(stage.size_px, stage.num_visible, stage.batch_size) for stage in plan.stages] == [
        (96, 14, 64),
        ((224, 160), 35, 32),
    ]
    assert flags("--recipe", str(path), "--curriculum", "vanilla").stages == ()


CONFIGS = st.builds(
    PretrainConfig,
    model=st.sampled_from([*MODELS, "yes", "1e3", "null", "é: #"]),  # text that YAML could take for something else
    input_size=st.one_of(st.integers(1, 500), st.tuples(st.integers(1, 500), st.integers(1, 500))),
    patch_size=st.none() | st.integers(1, 32),
    norm_pix_loss=st.booleans(),
    blr=st.floats(1e-9, 1e9),
    lr=st.none() | st.floats(1e-12, 1),
    mask_ratio=st.floats(0, 0.99),
    crop_scale=st.tuples(st.floats(1e-3, 0.5), st.floats(0.5, 1)),
    mean=st.none() | st.tuples(*[st.floats(0, 1)] * 3),
    epochs=st.floats(50, 1e6) | st.integers(50, 5000),
    data_path=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20).map("x".__add__),
    curriculum=st.just("custom"),
    stages=st.lists(
        st.builds(
            StageRow,
            size_px=st.one_of(st.integers(1, 500), st.tuples(st.integers(1, 500), st.integers(1, 500))),
            share=st.floats(1e-6, 1),
            mask_ratio=st.none() | st.floats(0, 0.99),
            num_visible=st.none() | st.integers(1, 50),
            crop_scale=st.none() | st.tuples(st.floats(0.1, 0.5), st.floats(0.5, 1)),
            lr_scale=st.floats(1e-3, 10),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
)


@settings(max_examples=20)
@given(CONFIGS)
def test_yaml_loses_nothing(config):
    assert read_back(config) == config
    assert from_dict(PretrainConfig, to_dict(config), where="test") == config


# -------------------------------------------------------------------------------------------------------------- flags


def test_the_command_of_facebookresearch_mae_means_here_what_it_meant_there():
    config = flags(
        *"--job_dir X --nodes 8 --use_volta32 --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss".split(),
        *"--mask_ratio 0.75 --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path D".split(),
    )
    assert config == PretrainConfig(
        job_dir="X",
        output_dir="X",
        nodes=8,
        use_volta32=True,
        batch_size=64,
        model="mae_vit_large_patch16",
        norm_pix_loss=True,
        epochs=800.0,
        blr=1.5e-4,
        data_path="D",
    )
    assert (config.mask_ratio, config.warmup_epochs, config.weight_decay, config.curriculum) == (
        0.75,
        40,
        0.05,
        "vanilla",
    )


def test_spellings_of_flags():
    assert flags(*DATA).pin_mem is True
    assert flags(*DATA, "--pin_mem").pin_mem is True
    for word in ("--no_pin_mem", "--no-pin-mem"):
        assert flags(*DATA, word).pin_mem is False
    for words in (["--batch_size", "7"], ["--batch-size", "7"], ["--batch_size=7"], ["--batch-size=7"]):
        assert flags(*DATA, *words).batch_size == 7
    assert flags("--data-path", "D") == flags("--data_path=D") == flags(*DATA)  # not the demo
    assert flags(*DATA, "--input_size", "224", "160").input_size == (224, 160)
    assert flags(*DATA, "--input_size", "96", "96").input_size == flags(*DATA, "--input_size", "96").input_size == 96
    assert parse(PlanConfig, ["--recipe", "demo", "--vs", "demo", "--json"]).json is True


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        flags("--help")
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("batch_size", "curriculum", "data_path", "no_pin_mem", "recipe"))


# ------------------------------------------------------------------------------------------------------------ mistakes


def from_mapping(**values):
    return from_dict(PretrainConfig, values, where="recipe R")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flags(*DATA, "--batch_sise", "3"), "--batch_sise.*perhaps you meant --batch_size"),
        (lambda: flags(*DATA, "--nonsense", "3"), "--nonsense.*see --help"),
        (lambda: flags(*DATA, "--batch_size", "many"), "--batch_size.*'many'"),
        (lambda: flags(*DATA, "--batch_size"), "--batch_size"),
        (lambda: flags(*DATA, "--mask_ratio", "1"), r"--mask_ratio must be in \[0, 1\), got 1"),
        (lambda: flags(*DATA, "--predict_ratio", "nan"), r"--predict_ratio must be in \(0, 1\], got nan"),
        (lambda: flags(*DATA, "--epochs", "0"), "--epochs must be positive"),
        (lambda: flags(*DATA, "--mean", "nan", "0", "0"), "--mean must be finite, got nan 0 0"),
        (lambda: flags(*DATA, "--value_range", "0", "inf"), "--value_range must be finite, got 0.0 inf"),
        (
            lambda: flags(*DATA, "--curriculum", "etpp"),
            r"'etpp' \(did you mean et_pp\?\).*vanilla, et, et_pp, et_pp_192, custom",
        ),
        (lambda: flags(*DATA, "--curriculum", "custom"), "--curriculum custom needs a recipe with `stages`"),
        (lambda: flags(*DATA, "--target", "hogs"), "choose from pixel, hog"),
        (lambda: flags(*DATA, "--lowfreq", "fft"), "choose from fourier, dct, lanczos, bilinear, scaled"),
        (lambda: flags(*DATA, "--allocation", "time"), "choose from area, flops"),
        (lambda: flags(*DATA, "--share_of", "time"), "choose from compute, epochs"),
        (lambda: flags(*DATA, "--precision", "fp16"), "choose from auto, bf16, fp32"),
        (lambda: flags(*DATA, "--target", "hog", "--norm_pix_loss"), "--norm_pix_loss .* contradicts --target hog"),
        (lambda: flags(*DATA, "--crop_scale", "2", "3"), "--crop_scale must be two areas"),
        (lambda: flags(*DATA, "--crop_scale", "0.5", "0.2"), "--crop_scale must be two areas"),
        (lambda: flags(*DATA, "--mean", "0.5"), "--mean has 1 numbers for --in_chans 3"),
        (
            lambda: flags(*DATA, "--accum_iter", "2", "--total_batch_size", "8"),
            "--accum_iter contradicts total_batch_size",
        ),
        (lambda: flags(*DATA, "--resume", "auto", "--overwrite"), "--resume .* and --overwrite"),
        (lambda: flags(*DATA, "--input_size", "8", "8", "8"), "--input_size: .*argument count 2 of `INT INT`"),
        (
            lambda: flags("--recipe", "demmo"),
            r"'demmo' \(did you mean demo\?\); choose from demo, .*in1k_vitb_mae400_hog",
        ),
        (lambda: from_mapping(batch_sise=3), "^recipe R: unknown key 'batch_sise'; did you mean batch_size"),
        (lambda: from_mapping(xyzzy=3), "^recipe R: unknown key 'xyzzy'; choose from recipe, model, "),
        (lambda: from_mapping(batch_size="3"), "^recipe R: batch_size should be int, got '3'"),
        (lambda: from_mapping(batch_size=True), "^recipe R: batch_size should be int, got True"),
        (lambda: from_mapping(batch_size=2.5), "^recipe R: batch_size should be int, got 2.5"),
        (lambda: from_mapping(norm_pix_loss=1), "^recipe R: norm_pix_loss should be bool, got 1"),
        (lambda: from_mapping(epochs="long"), "^recipe R: epochs should be float, got 'long'"),
        (lambda: from_mapping(crop_scale=[0.2]), r"^recipe R: crop_scale should be tuple\[float, float\], got \[0.2\]"),
        (
            lambda: from_mapping(stages=[{"size_px": 96, "shar": 1}]),
            "^recipe R: stages: unknown key 'shar'; did you mean share",
        ),
        (lambda: from_mapping(stages=[{"size_px": 96}]), "^recipe R: stages: share is missing"),
    ],
)
def test_a_mistake_gets_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not a YAML file"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("lr: fast", "lr should be"),
        (
            "recipe: small\nlr: 1.0e-3",
            "a recipe doesn't extend another, `recipe: small` .*--recipe small --print_config",
        ),
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.* {message}") as error:
        flags("--recipe", str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"--recipe: no file .*missing\.yaml"):
        flags("--recipe", str(tmp_path / "missing.yaml"))


def test_an_unknown_model_is_named_with_the_legal_ones():
    with pytest.raises(ValueError, match=r"'mae_vit_bse_patch16' \(did you mean mae_vit_base_patch16\?\)") as error:
        shape_of(flags(*DATA, "--model", "mae_vit_bse_patch16"))
    assert all(name in str(error.value) for name in MODELS)
    wanted = shape_of(flags(*DATA, "--model", "mae_vit_base_patch16"))
    for name in ("vit_base_patch16", "mae_vit_base_patch16_dec512d8b"):
        assert shape_of(flags(*DATA, "--model", name)).embed_dim == wanted.embed_dim == 768


def test_the_size_of_a_custom_stage_is_named_by_its_key():
    config = from_mapping(curriculum="custom", stages=[{"size_px": 20, "share": 1.0}])
    with pytest.raises(ValueError, match=r"^stages: size_px 20 px is not divisible by the patch \(16 px\)"):
        build_curriculum(config, 100)


def test_a_custom_stage_may_not_be_larger_than_the_input():
    config = from_mapping(curriculum="custom", stages=[{"size_px": 256, "share": 1.0}])
    with pytest.raises(ValueError, match="size 256 px is larger than --input_size 224"):
        build_curriculum(config, 100)

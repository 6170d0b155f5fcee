"""README and docs are true in what a machine can check: commands parse, paths exist, code compiles, lines fit."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

from mae_et.cli import COMMANDS, ExportConfig
from mae_et.compare.compare import CompareConfig
from mae_et.data.config import MeasureConfig, PrepareConfig
from mae_et.evaluate.config import FinetuneConfig, ReconstructConfig
from mae_et.plan.config import PretrainConfig
from mae_et.plan.flags import parse
from mae_et.plan.report import PlanConfig, plan_report
from mae_et.search.config import SearchConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "plan": PlanConfig,
    "compare": CompareConfig,
    "export": ExportConfig,
    "prepare": PrepareConfig,
    "measure": MeasureConfig,
    "search": SearchConfig,
    "reconstruct": ReconstructConfig,
}
#: What a command of ours begins with, wherever it stands in a line.
COMMAND = re.compile(r"(?:main_(?P<script>pretrain|finetune)\.py|python3? -m mae_et (?P<command>\w+)) (?P<flags>.*)")
BENCHMARK = re.compile(r"python3? (?P<path>benchmarks/\w+\.py)(?P<flags> .*)?$")


def code(page: Path) -> list[str]:
    """Lines of fenced and indented blocks, continued ones joined, and inline code."""
    text = page.read_text()
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [re.sub(r"\s+", " ", span) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return [line.split(" #")[0].strip() for line in lines + inline]


def words(flags: str) -> list[str]:
    """As a shell splits them, placeholders filled in, without what stands for more of them."""
    split = shlex.split(re.split(r"[|;&>]", flags)[0])
    return [{"NAME": "demo", "N": "1"}.get(word, word) for word in split if word != "…" and word[0] != "$"]


def commands(pattern: re.Pattern) -> list:
    found = [(page, match) for page in PAGES for line in code(page) if (match := pattern.search(line))]
    return [pytest.param(match, id=f"{page.stem}: {match[0][:60]}") for page, match in found]


@pytest.mark.parametrize("match", commands(COMMAND))
def test_commands_parse(match, tmp_path, monkeypatch):
    command = match["command"] or match["script"]
    assert command in COMMANDS
    arguments = words(match["flags"])
    own = tmp_path / "own.yaml"  # for files that a reader writes
    own.write_text((ROOT / "mae_et" / "recipes" / "demo.yaml").read_text())
    arguments = [str(own) if word.endswith(".yaml") and not (ROOT / word).exists() else word for word in arguments]
    if command == "finetune" and not {"--finetune", "--like"} & set(arguments):
        arguments += ["--finetune", "RUN"]  # which a sentence leaves out
    monkeypatch.chdir(ROOT)
    if arguments:  # else only the command is spoken of
        parse(CONFIGS[command], arguments)


@pytest.mark.parametrize("match", commands(BENCHMARK))
def test_benchmarks_parse(match, monkeypatch):
    path = ROOT / match["path"]
    arguments, text = words(match["flags"] or ""), path.read_text()
    config = re.search(r"tyro\.cli\((\w+)", text)
    if not arguments or not config:  # argparse's flags stand in the text as they are
        assert all(f'"{word}"' in text for word in arguments if word.startswith("--"))
        return
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    tyro.cli(getattr(module, config[1]), args=arguments, use_underscores=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) if "://" not in link]
    links += re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:mae_et|benchmarks|docs|tests|examples)/[\w./]+)`", text)
    missing += [path for path in named if not (ROOT / path).exists() and not (ROOT / "mae_et" / path).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_headings_that_are_linked_exist(page):
    """As GitHub names them: small letters, hyphens for spaces, no punctuation."""
    links = re.findall(r"\]\(([\w./-]*)#([^)]+)\)", page.read_text())
    for path, anchor in links:
        target = (page.parent / path) if path else page
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_compiles(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_fit(page):
    longest = 100 if page.name == "README.md" else 120
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > longest] == []
    assert page.name != "README.md" or len(lines) <= 110


def test_the_table_of_recipes_for_imagenet_is_what_plan_prints():
    rows = re.findall(r"^\| `(in1k_\w+)` \| (.*) \|$", (ROOT / "docs/imagenet.md").read_text(), re.MULTILINE)
    assert len(rows) > 8
    for recipe, cells in rows:
        flags = ["--recipe", recipe, "--devices", "8", "--device_flops", "989e12"]
        report = plan_report(parse(PlanConfig, flags), lambda config: config.num_images)
        total, memory = report["totals"], [f"{s['peak_memory_bytes'] / 2**30:.1f}" for s in report["stages"]]
        passes, steps, flops, hours, _, gib, _ = cells.split(" | ")
        assert [passes, steps] == [f"{total['passes']:.0f}", f"{total['steps']:,}"], recipe
        assert [flops, hours] == [f"{total['flops']:.2e}".replace("e+", "e"), f"{8 * report['scaling']['hours']:.0f}"]
        assert gib.split(" to ") == list(dict.fromkeys((memory[0], memory[-1]))), recipe

"""Every command of README and docs is marked: run (by `make test-all` and CI), or not, for a reason that is listed. All
of them name commands and options that there are, and files that are there."""

import ast
import dataclasses
import re
from importlib import import_module
from pathlib import Path

import pytest

from eellm.cli.main import VERBS
from eellm.cli.options import _flags
from eellm.config.plan import PlanConfig
from eellm.config.serve import ServeConfig
from eellm.config.train import TrainConfig
from eellm.config.tune import TuneConfig
from examples.run_docs import LANGUAGES, NOT_RUN, ROOT, blocks, commands, pages, run_page

RECIPES = {"train": (TrainConfig,), "tune": (TuneConfig,), "serve": (ServeConfig,), "plan": (PlanConfig, TrainConfig)}
PAGES = [page for page in pages() if any(block.is_run for block in blocks(page))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_block_of_commands_is_marked_with_run_or_a_listed_reason(page):
    for block in blocks(page):
        if block.language in LANGUAGES:
            assert block.mark is not None, f"{block}: has no mark"
            reason = block.mark.partition("not run: ")[2]
            assert block.mark in ("run", "run: server", "setup") or reason in NOT_RUN, f"{block}: {block.mark}"
        else:
            assert block.mark is None, f"{block}: {block.mark} before a block of '{block.language}'"
            assert block.language not in ("sh", "shell", "console", "py"), f"{block}: call it {' or '.join(LANGUAGES)}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_no_command_hides_in_a_block_of_another_language(page):
    command = re.compile(r"^\$? ?(eellm|torchrun|make|pip|python|docker|kubectl|curl) ", re.MULTILINE)
    hidden = [str(b) for b in blocks(page) if b.language in ("", "text") and command.search(b.text)]
    assert hidden == []


def test_every_reason_is_needed():
    used = {b.mark.partition("not run: ")[2] for page in pages() for b in blocks(page) if b.mark and not b.is_run}
    assert used == set(NOT_RUN)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_have_only_verbs_and_options_that_there_are(page):
    for block in blocks(page):
        for verb, *words in commands(block):
            if verb.startswith("-"):
                assert verb in ("--help", "--version"), f"{block}: eellm {verb}"
                continue
            assert verb in VERBS, f"{block}: eellm {verb}"
            configs = RECIPES[verb] if verb in RECIPES else (import_module(VERBS[verb][0]).Options,)
            known = {"--help", *(flag for config in configs for flag in _flags(config, "--"))}
            flags = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
            assert set(flags) <= known, f"{block}: eellm {verb}: {set(flags) - known}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_python_blocks_are_python(page):
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text, filename=str(block))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_files_of_the_project_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:eellm|tests|examples|recipes|benchmarks|deploy|models)/[\w./-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_scripts_and_recipes_that_commands_name_are_there(page):
    for block in blocks(page):
        if block.language == "bash":
            named = re.findall(
                r"(?:^|\s)((?:examples|benchmarks|recipes|deploy)/[\w./-]+\.(?:py|sh|toml|yaml))", block.text
            )
            made = ("deploy/keys.toml",)
            assert [name for name in named if name not in made and not (ROOT / name).exists()] == [], str(block)


def test_a_block_without_a_mark_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- run -->\n```bash\ntrue\n```\n\n<!-- setup\ntrue\n-->\n```python\n1\n```\n```\nx\n```\n")
    found = [dataclasses.astuple(block)[2:] for block in blocks(page)]
    expected = [("bash", "run", "true\n"), ("bash", "setup", "true\n"), ("python", None, "1\n"), ("", None, "x\n")]
    assert found == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_s_commands_run(page):
    assert run_page(page) > 0

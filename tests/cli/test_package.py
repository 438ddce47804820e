"""What a wheel holds, that it works without the checkout, and that nothing heavy is imported before it is needed.

Modules are counted, not seconds: those depend on what else the machine does. `examples/stranger.sh` measures them.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "tyro", "rich", "fastapi"}


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=True, **options).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the package, without a network."""
    here = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "eellm", here / "source/eellm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, here / "source")
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(here), str(here / "source"))
    (built,) = here.glob("eellm-*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for path in ROOT.glob("eellm/**/*") if path.is_file() and "__pycache__" not in path.parts]
    assert held == {str(path.relative_to(ROOT)) for path in files}
    assert "eellm/py.typed" in held


def test_the_wheel_works_in_an_environment_without_the_checkout(wheel, tmp_path):
    """Without its dependencies: `import eellm`, help, and what config and errors need."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    install = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
    run(*install, "--target", str(site), str(wheel))
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import eellm; print(eellm.__file__, eellm.ModelConfig.__name__, eellm.EellmError.__name__)"
    said = run(python, "-c", code, cwd=tmp_path, env=alone)
    assert said.split() == [str(site / "eellm/__init__.py"), "ModelConfig", "EellmError"]
    assert "generate" in run(python, "-m", "eellm", "--help", cwd=tmp_path, env=alone)


@pytest.mark.parametrize("code", ["import eellm", "from eellm.cli.main import main; main(['--help'])"])
def test_importing_and_help_load_no_library(code):
    code += "\nimport sys; print('|', *sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(run(sys.executable, "-c", code).rpartition("|")[2].split())
    assert "eellm" in loaded
    assert loaded & HEAVY == set()


def test_readme_says_how_many_lines_there_are_to_read():
    kinds = {".py", ".cpp", ".h", ".js", ".css", ".html", ".jinja"}
    files = [path for path in ROOT.glob("eellm/**/*") if path.suffix in kinds]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    (said,) = re.findall(r"^About ([\d,]+) lines", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert abs(int(said.replace(",", "")) / lines - 1) < 0.05, f"{lines} lines"

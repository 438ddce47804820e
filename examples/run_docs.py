"""Runs the commands of README and docs as a reader would: `python examples/run_docs.py docs/tutorial.md`.

    page → blocks, each with the mark that stands before it → run in their order, in a directory of the page's own

Every fenced block of `bash` or `python` has a mark, an HTML comment that no reader sees:

    <!-- run -->            run it
    <!-- run: server -->    start it, wait until it says that it serves, stop it when the page is done
    <!-- not run: WHY -->   why not, one of NOT_RUN
    <!-- setup … -->        commands that the page needs and its reader doesn't; run where they stand

The directory has links to what a checkout has. Port 8000 of a page becomes a free one.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("benchmarks", "deploy", "docs", "examples", "models", "recipes", "README.md")
NOT_RUN = {
    "CI runs it": "a step of .ci/run by itself",
    "before a release": "longer than CI may take, which runs a part of it",
    "the quickstart runs it": "needs the model that `make quickstart` fetches",
    "the tutorial does it": "the same command with the tutorial's own files",
    "several machines": "there is one here",
    "Slurm": "there is none here",
    "Docker": "there is none here",
    "Kubernetes": "there is none here",
    "installs": "changes the reader's environment; examples/stranger.sh installs a wheel",
    "hours": "takes hours",
    "eight processes": "tests/distributed runs that layout",
    "a fragment": "a part of something that is run elsewhere",
    "a long text": "hundreds of documents, which this repository doesn't carry; tests/cli runs the command on others",
    "needs peers": "packages of other projects, in environments of their own",
}
"""Why a block may not be run here."""
LANGUAGES = ("bash", "python")
_BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|(?:^<!-- (?P<mark>(?:not )?run(?:: [^>]+?)?) -->\n+)?^```(?P<language>[a-z]*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page, or a hidden one."""

    page: Path
    line: int
    language: str
    """Empty where the fence names none."""
    mark: str | None
    """`run`, `run: server`, `not run: WHY`, `setup`, or None."""
    text: str

    @property
    def is_run(self) -> bool:
        return self.mark is not None and not self.mark.startswith("not run")

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """README, CONTRIBUTING and every page of the docs but the lab notebook, whose commands are of their day."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(p for p in sorted(ROOT.glob("docs/**/*.md")) if p.name != "log.md"),
    ]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        hidden = match["setup"] is not None
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start()) + 1,
                language="bash" if hidden else match["language"],
                mark="setup" if hidden else match["mark"],
                text=match["setup"] if hidden else match["text"],
            )
        )
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each `eellm` command in a block, without the word itself."""
    for line in re.sub(r"\\\n", " ", block.text).splitlines():
        words = shlex.split(line, comments=True) if "eellm" in line else []
        if "eellm" in words and (words[0] == "eellm" or words[words.index("eellm") - 1] == "-m"):
            yield words[words.index("eellm") + 1 :]


def run_page(page: Path) -> int:
    """Runs a page's blocks; returns how many. Raises CalledProcessError with the first that fails."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as directory, _servers() as servers:
        for name in LINKED:
            (Path(directory) / name).symlink_to(ROOT / name)
        todo = [block for block in blocks(page) if block.is_run]
        for block in todo:
            print(f"\n--- {block} ({block.mark})\n{block.text.rstrip()}", flush=True)
            text = block.text.replace("8000", str(port))
            if block.mark == "run: server":
                servers.append(_serve(text, directory))
            else:
                command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
                subprocess.run([*command, text], cwd=directory, env=_environment(), check=True)
    return len(todo)


def _environment() -> dict[str, str]:
    """Of this interpreter: its commands come first, and what is imported here is imported there."""
    import eellm

    assert eellm.__file__ is not None, "a package"
    home = Path(eellm.__file__).parents[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(home), "PYTHONUNBUFFERED": "1"}


def _serve(text: str, directory: str) -> subprocess.Popen[str]:
    """A server that answers; whatever else it says is passed on."""
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", f"exec {text.strip()}"],
        cwd=directory,
        env=_environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None, "a pipe"
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("serving "):
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process
    raise subprocess.CalledProcessError(process.wait(), text)


@contextmanager
def _servers() -> Iterator[list[subprocess.Popen[str]]]:
    """Servers that are added end with the page, and must end well."""
    running: list[subprocess.Popen[str]] = []
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=120) for process in running]
    if any(codes):
        raise RuntimeError(f"servers ended with {codes}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the commands of pages, README and all docs if none is named.")
    parser.add_argument("pages", nargs="*", type=Path)
    for page in parser.parse_args().pages or pages():
        print(f"=== {page}: {run_page(page.resolve())} blocks ran", flush=True)


if __name__ == "__main__":
    main()

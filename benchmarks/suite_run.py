"""Runs one part: its script as a process of its own, with a time-out; what came of it is kept beside its JSON.

DIRECTORY/NAME.json       what the script wrote
DIRECTORY/NAME.part.json  the command, how it ended, its last lines, the load: a part that is `done` isn't run again
DIRECTORY/NAME.log        all that it said
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from peers import Peer
from processes import end_session
from suite_parts import ROOT, Length, Part, words
from suite_rows import Row

NUM_LINES = 8
"""Last ones of a script that failed."""
END_S = 60
"""Until a part that was told to end is killed; it may have to end servers first."""
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a part."""

    name: str
    status: Literal["done", "failed", "missing"]
    command: str = ""
    """As one would type it in the repository's root."""
    why: str = ""
    """Its last lines, or what isn't there."""
    code: str = ""
    """What `git describe` calls it."""
    seconds: float = 0.0
    load: tuple[float, float] | None = None


def run_part(
    part: Part, length: Length, directory: Path, peers_file: Path, peers: Mapping[str, Peer], *, anew: bool = False
) -> Outcome:
    """Runs it, or says why it can't. anew: also where the same command is done already."""
    for path, remedy in part.needs.items():
        if not (ROOT / path).exists():
            return Outcome(name=part.name, status="missing", why=f"{path} isn't there; {remedy}")
    out = directory / f"{part.name}.json"
    argv = _argv(part, length, out, peers_file, peers)
    outcome = Outcome(name=part.name, status="done", command=shlex.join(map(relative, argv)), code=code_version())
    before = _finished(directory, part.name)
    if before is not None and before.command == outcome.command and not anew:
        return before
    out.unlink(missing_ok=True)
    load, start = os.getloadavg()[0], time.monotonic()
    why = _call(argv, part.timeout_s[length], directory / f"{part.name}.log")
    if not why and not out.is_file():
        why = f"it ended well, but wrote no {out.name}"
    outcome = replace(
        outcome,
        status="failed" if why else "done",
        why=why,
        seconds=time.monotonic() - start,
        load=(load, os.getloadavg()[0]),
    )
    _kept(directory, part.name).write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
    return outcome


def code_version() -> str:
    command = ["git", "describe", "--always", "--dirty", "--tags"]
    described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "not a git checkout"


def _argv(part: Part, length: Length, out: Path, peers_file: Path, peers: Mapping[str, Peer]) -> list[str]:
    command = part.command(length)
    assert command is not None, f"{part.name} has no {length} form"
    python = sys.executable
    if part.runs_in is not None:
        python = peers[part.runs_in].python or python  # without it the script compares with what there is here
    return [python, *words(command, out=out, peers_file=peers_file, peers=peers)]


def relative(word: str) -> str:
    """A path of the repository, as seen from its root."""
    path = Path(word)
    if path == Path(sys.executable):
        return "python"
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else word


def _kept(directory: Path, name: str) -> Path:
    return directory / f"{name}.part.json"


def _finished(directory: Path, name: str) -> Outcome | None:
    """What an earlier run of the suite made of it, if it was done."""
    file = _kept(directory, name)
    if not file.is_file() or not (directory / f"{name}.json").is_file():
        return None
    fields = json.loads(file.read_text(encoding="utf-8"))
    outcome = Outcome(**fields | {"load": tuple(fields["load"])})
    return outcome if outcome.status == "done" else None


def rows_of(part: Part, outcome: Outcome, directory: Path, peers: Mapping[str, Peer]) -> list[Row]:
    """The report's. A part that isn't done is one row; so is one whose JSON isn't what it should be."""
    if outcome.status != "done":
        return [_unfinished(part, outcome, outcome.why)]
    data = json.loads((directory / f"{part.name}.json").read_text(encoding="utf-8"))
    try:
        rows = part.rows(data, peers)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        why = f"its JSON isn't what the suite expects: {type(error).__name__}: {error}"
        return [_unfinished(part, replace(outcome, status="failed"), why)]
    versions = {"torch": data["torch"]} if "torch" in data else {}
    common = {"part": part.name, "command": outcome.command}
    return [replace(row, load=row.load or outcome.load, versions=row.versions or versions, **common) for row in rows]


def _unfinished(part: Part, outcome: Outcome, why: str) -> Row:
    assert outcome.status != "done"
    fields = {"part": part.name, "command": outcome.command, "load": outcome.load}
    return Row(name=f"{part.name}: {part.shows}", status=outcome.status, remarks=why, **fields)


def _call(argv: list[str], timeout_s: float, log: Path) -> str:
    """Why it failed; empty if it didn't. All that it started ends with it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"ended after {timeout_s:.0f} s\n{_last_lines(log)}"
        finally:
            if process.poll() is None:
                end_session(process, END_S)
    return f"ended with {code}\n{_last_lines(log)}" if code else ""


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-NUM_LINES:])

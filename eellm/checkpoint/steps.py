"""Checkpoints of a run as directories: which there are, whether one is whole, how one comes and goes in one go.

    checkpoints/step-00000100/        the files of torch.distributed.checkpoint, further ones (the tokenizer's), and
        checkpoint.json               {"format_version": 1, "step": 100, "state": {…},
                                       "files": {"__0_0.distcp": {"size": 9, "sha256": "…"}, …}, "sha256": "…"}
    checkpoints/.step-00000100.tmp/   being written, or being removed
    checkpoints/.step-00000100.old/   being replaced by a new one of the same step

A directory gets its name when it is complete, and loses it before its first file goes, so that a process killed at any
moment leaves checkpoints that load and hidden leftovers, which `clean` removes. No torch here.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eellm.checkpoint.files import read_json
from eellm.errors import CheckpointError, UnsupportedError

MARKER = "checkpoint.json"
FORMAT_VERSION = 1


def step_dir(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` lies."""
    return directory / f"step-{step:08d}"


def temporary_dir(directory: Path, step: int) -> Path:
    """Where it is written."""
    return directory / f".step-{step:08d}.tmp"


def list_steps(directory: Path) -> list[int]:
    """The steps whose checkpoints are in `directory`, ascending; damaged ones too."""
    if not directory.is_dir():
        return []
    found = {_step_of(path): path for path in directory.iterdir()}
    return sorted(step for step, path in found.items() if step is not None and (path / MARKER).is_file())


def write_marker(path: Path, step: int, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Completes the checkpoint in `path`; `files` has the `file_entry` of every other file."""
    marker = {"format_version": FORMAT_VERSION, "step": step, "state": state, "files": files}
    text = json.dumps(marker | {"sha256": _digest(marker)}, indent=1, ensure_ascii=False)
    write_durably(path / MARKER, text.encode())


def read_marker(path: Path) -> dict[str, Any]:
    """The content of checkpoint.json. Raises CheckpointError where it is missing or damaged."""
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{path}: not a checkpoint: it has no {MARKER}")
    try:
        marker = read_json(path / MARKER)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_way_back(path)}") from None
    version = marker.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UnsupportedError(f"{path}: format_version = {version}: written by a newer eellm; this one reads 1")
    if marker.pop("sha256", None) != _digest(marker):
        raise CheckpointError(f"{path / MARKER} is damaged: its SHA-256 is another; {_way_back(path)}")
    return marker


def check_files(path: Path, marker: dict[str, Any], names: Iterable[str]) -> None:
    """Raises CheckpointError unless the files `names` of a checkpoint are as they were written."""
    for name in names:
        expected, file = marker["files"][name], path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            wrong = "is missing"
        elif size != expected["size"]:
            wrong = f"has {size} bytes instead of {expected['size']}"
        elif file_entry(file) != expected:
            wrong = "is damaged: its SHA-256 is another"
        else:
            continue
        raise CheckpointError(f"{file} {wrong}; {_way_back(path)}")


def file_entry(file: Path) -> dict[str, Any]:
    """What the marker says of a file."""
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def put_in_place(directory: Path, step: int) -> None:
    """Gives a complete directory its name; one of the same step that is there already goes."""
    temporary, place, old = temporary_dir(directory, step), step_dir(directory, step), _old_dir(directory, step)
    sync_directory(temporary)
    if place.exists():
        place.rename(old)
    temporary.rename(place)
    sync_directory(directory)
    shutil.rmtree(old, ignore_errors=True)


def keep_last(directory: Path, step: int, keep: int) -> None:
    """Removes all checkpoints but the last `keep` up to `step`, which was just written.

    Later ones are of a line that the run has left: it went back to an older checkpoint, or started anew.
    """
    steps = list_steps(directory)
    kept = [s for s in steps if s <= step][-keep:]
    for other in steps:
        if other not in kept:
            hidden = temporary_dir(directory, other)
            step_dir(directory, other).rename(hidden)  # first: half of a directory must not have its name
            shutil.rmtree(hidden)


def clean(directory: Path) -> None:
    """Removes what a killed process has left; a checkpoint that was being replaced comes back."""
    for old in directory.glob(".step-*.old"):
        place = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if place.exists():
            shutil.rmtree(old)
        else:
            old.rename(place)
    for temporary in directory.glob(".step-*.tmp"):
        shutil.rmtree(temporary)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file that is on the disk, not in its cache, on return."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def _old_dir(directory: Path, step: int) -> Path:
    return directory / f".step-{step:08d}.old"


def _digest(marker: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()


def _way_back(path: Path) -> str:
    """What the user of a damaged checkpoint can do."""
    step = _step_of(path)
    older = [] if step is None else [s for s in list_steps(path.parent) if s < step]
    if not older:
        return "there is no older checkpoint beside it"
    return f"the one before it is step {older[-1]}: remove {path} to go on from there"

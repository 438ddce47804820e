"""Files that are either whole or absent: safetensors in and out, their hash, and directories replaced in one go.

A directory's *marker* (config.json, exits.json) is what makes it loadable. When files are replaced, the marker goes
first and comes back last, so that a process killed in between leaves a directory that is refused, never one that
loads wrongly.
"""

import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eellm.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@contextmanager
def replacing(directory: Path, *, marker: str, owned: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty temporary directory; what was written there becomes `directory` when the block ends well.

    Files of an existing `directory` stay, but for those replaced and those that match the patterns `owned` and were
    not written again. When the block fails, `directory` is as before. Raises CheckpointError for a full disk.
    """
    place = directory.resolve()  # "." has no name; beside a link's target, not beside the link: moves stay on one disk
    temporary = place.with_name(f".{place.name}.tmp-{os.getpid()}")
    outcome = "nothing was changed"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process that had our number
        temporary.mkdir(parents=True)
        yield temporary
        if directory.is_dir():
            outcome = f"{directory} is incomplete now and will be refused; save it again"
            _move_into(temporary, directory, marker, owned)
        else:
            temporary.rename(directory)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise CheckpointError(f"can't write {directory}: {reason}; {outcome}") from error
    except SafetensorError as error:
        raise CheckpointError(f"can't write {directory}: {error}; {outcome}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into(source: Path, directory: Path, marker: str, owned: Sequence[str]) -> None:
    new = {file.name for file in source.iterdir()}
    (directory / marker).unlink(missing_ok=True)
    for pattern in owned:
        for stale in directory.glob(pattern):
            if stale.name not in new:
                stale.unlink()
    for name in sorted(new, key=lambda name: name == marker):  # the marker last
        (source / name).replace(directory / name)


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_json(path: Path, data: dict[str, Any]) -> None:
    """Writes the file anew; whoever reads it sees the old or the new one. Raises CheckpointError."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_json(temporary, data)
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"can't write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where the file is missing or isn't a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.touch()
    mode = (
        path.stat().st_mode
    )  # that of any new file here; safetensors from 0.8 on lets nobody but the owner read its own
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_sharded(
    directory: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int, *, indexed: bool = False
) -> None:
    """model.safetensors, or numbered shards with an index where they'd exceed `max_shard_bytes`. indexed: an index for
    the single file too, where others lie beside it that aren't the model's."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        write_tensors(directory / file, {name: tensors[name] for name in names})
    if indexed or len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(t.nbytes for t in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, one or as its index lists them; each exists."""
    index = directory / INDEX
    if not index.exists():
        files = [directory / "model.safetensors"]
    else:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no 'weight_map' of tensors' names to files' names")
        files = [directory / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; fetch the model again, as safetensors")
    return files


def read_tensors(path: Path, *, device: str | torch.device = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor), one at a time. Raises CheckpointError for a truncated file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from None


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all tensors; the same however they are sharded."""
    lines: list[str] = []
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for path in files:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                start = 8 + int.from_bytes(memory[:8], "little")
                header = json.loads(memory[8:start])
                header.pop("__metadata__", None)

                def digest(item: tuple[str, Any], memory: mmap.mmap = memory, start: int = start) -> str:
                    name, entry = item
                    with memoryview(memory) as view:
                        begin, end = entry["data_offsets"]
                        value = hashlib.sha256(view[start + begin : start + end]).hexdigest()
                    return f"{name} {entry['dtype']} {entry['shape']} {value}"

                lines += pool.map(digest, header.items())
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

"""A run's checkpoints: saved in the background by all processes, loaded under any layout of processes.

In: a flat dict of tensors, plain or DTensors, under names that don't depend on the layout; a JSON dict; small files.
Out: directories that are whole or absent (`eellm.checkpoint.steps`). torch.distributed.checkpoint writes and reshards
the tensors: each process writes what it holds, and what several hold is written once.

What one process finds wrong is raised on all of them, so that none waits for one that has left. A run has one store,
and the directory has one run (`eellm.train.run_dir`).
"""

import errno
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from eellm.checkpoint.steps import (
    check_files,
    clean,
    file_entry,
    keep_last,
    list_steps,
    put_in_place,
    read_marker,
    step_dir,
    temporary_dir,
    write_durably,
    write_marker,
)
from eellm.errors import CheckpointError

T = TypeVar("T")


class Store:
    """The checkpoints in one directory. All methods but `read_state` are called by all processes, in the same order."""

    def __init__(self, directory: Path, *, keep: int, process_group: dist.ProcessGroup | None = None) -> None:
        """Removes what a killed run has left.

        keep: number of checkpoints that stay. process_group: all processes of the run, on gloo, and for this store
        alone, as it is used in the background; unset, a new one, or none in a single process.
        """
        self.directory = directory
        self.keep = keep
        if process_group is None and dist.is_initialized():
            process_group = dist.new_group(backend="gloo")  # pyrefly: ignore[bad-assignment]
        self._group = process_group
        self._rank = 0 if process_group is None else process_group.rank()
        self._num_ranks = 1 if process_group is None else process_group.size()
        self._saving: tuple[int, Future[Any]] | None = None
        self._on_rank_0(lambda: clean(directory))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copies everything and returns; the copy is written in the background.

        tensors: of equal content wherever a name is held more than once. state: plain data for JSON; rank 0's counts,
        as do its `files`, name → content. Waits for the save before, and raises its CheckpointError.
        """
        self.wait()
        if self._group is None:
            _expect_a_single_process()
        state = json.loads(json.dumps(state))
        future = dcp.async_save(
            dict(tensors),
            storage_writer=_Writer(self.directory, step, state=state, files=dict(files or {}), keep=self.keep),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(future, Future)  # not torch's pair of futures: `_Writer` copies before it returns
        self._saving = step, future

    def wait(self) -> None:
        """Returns when the last save is in place. Raises CheckpointError, on every process, if it failed on any."""
        if self._saving is None:
            return
        step, future = self._saving
        error = future.exception()
        self._saving = None
        if error is None:
            return
        if self._rank == 0:
            shutil.rmtree(temporary_dir(self.directory, step), ignore_errors=True)
        place = step_dir(self.directory, step)
        raise CheckpointError(
            f"can't write {place}: {_reason(error)}; checkpoints before it are as they were"
        ) from error

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending, as rank 0 sees them."""
        self.wait()
        return self._on_rank_0(lambda: list_steps(self.directory))

    def latest(self, *, before: int | None = None) -> int | None:
        """The newest step with a checkpoint (older than `before`, where that one is damaged), or None."""
        return max((step for step in self.steps() if before is None or step < before), default=None)

    def read_state(self, step: int) -> dict[str, Any]:
        """What `save` got as `state`. Asks no other process. Raises CheckpointError."""
        return read_marker(step_dir(self.directory, step))["state"]

    def load(self, step: int, into: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fills the tensors `into`, in place, and returns the state.

        Names, shards and number of processes needn't be those of the save; values are converted to the tensors' dtypes.
        Raises CheckpointError, on every process, for a missing or damaged file (go back with `latest(before=step)`),
        and for a tensor that isn't there or has another shape; then nothing was filled.
        """
        self.wait()
        path = step_dir(self.directory, step)
        marker = self._together(lambda: _checked_marker(path, self._rank, self._num_ranks))
        self._together(lambda: _check_tensors(path, into))
        _read_tensors(path, into, self._group)
        return marker["state"]

    def _on_rank_0(self, work: Callable[[], T]) -> T:
        """What `work()` returns or raises on rank 0, on every rank."""
        outcome = [_attempt(work) if self._rank == 0 else None]
        if self._group is not None:
            dist.broadcast_object_list(outcome, group_src=0, group=self._group)
        assert outcome[0] is not None
        value, error = outcome[0]
        if error is not None:
            raise error
        return value  # pyrefly: ignore[bad-return]

    def _together(self, work: Callable[[], T]) -> T:
        """What `work()` returns here; where it fails on any rank, that error on all."""
        value, error = _attempt(work)
        errors: list[CheckpointError | None] = [error]
        if self._group is not None:
            errors *= self._num_ranks
            dist.all_gather_object(errors, error, group=self._group)
        for error in errors:
            if error is not None:
                raise error
        return value  # pyrefly: ignore[bad-return]


def load_tensors(path: Path, into: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fills plain tensors from the checkpoint directory `path`, in a single process; returns the state.

    Raises CheckpointError as `Store.load` does.
    """
    marker = _checked_marker(path, 0, 1)
    _check_tensors(path, into)
    _read_tensors(path, into, None)
    return marker["state"]


@dataclass(frozen=True)
class _Written(WriteResult):
    """One tensor's part, written; with it travels what rank 0 must know of its file."""

    file: str
    entry: dict[str, Any]


class _Writer(dcp.FileSystemWriter):
    """Writes one checkpoint under another name; rank 0 gives it its own when all have written their parts.

    torch calls `stage` at once and then, in the background, `prepare_local_plan` on all ranks, `prepare_global_plan` on
    rank 0, `write_data` on all, `finish` on rank 0. In between it exchanges plans and results, and errors with them.
    """

    def __init__(
        self, directory: Path, step: int, *, state: dict[str, Any], files: dict[str, bytes], keep: int
    ) -> None:
        self.temporary = temporary_dir(directory, step)
        super().__init__(self.temporary)
        self.directory = directory
        self.step = step
        self.state = state
        self.files = files
        self.keep = keep

    def stage(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies that training can't touch. NOTE torch's own stager returns DTensors without dimensions uncopied."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state_dict.items()}

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the directory is rank 0's to make: it may have to remove one first

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        clean(self.directory)
        self.temporary.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        names = {result.index: result.storage_data.relative_path for result in results}
        entries = {name: file_entry(self.temporary / name) for name in set(names.values())}
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written.set_result(
            [
                _Written(r.index, r.size_in_bytes, r.storage_data, names[r.index], entries[names[r.index]])
                for r in results
            ]
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        for name, content in self.files.items():
            write_durably(self.temporary / name, content)
        entries = {part.file: part.entry for parts in results for part in parts if isinstance(part, _Written)}
        for file in self.temporary.iterdir():
            if file.name not in entries:
                entries[file.name] = file_entry(file)
        write_marker(self.temporary, self.step, self.state, dict(sorted(entries.items())))
        put_in_place(self.directory, self.step)
        keep_last(self.directory, self.step, self.keep)


def _checked_marker(path: Path, part: int, num_parts: int) -> dict[str, Any]:
    """The marker of a checkpoint of whose files every `num_parts`th one has been checked."""
    marker = read_marker(path)
    by_size = sorted(marker["files"], key=lambda name: (marker["files"][name]["size"], name))
    check_files(path, marker, by_size[part::num_parts])
    return marker


def _check_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for what `into` wants and the checkpoint hasn't."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    missing = sorted(into.keys() - stored.keys())
    if missing:
        raise CheckpointError(
            f"{path}: tensor '{missing[0]}' is missing ({len(missing)} in all): it is of another model"
        )
    for name, tensor in into.items():
        entry = stored[name]
        assert isinstance(entry, TensorStorageMetadata), "only tensors are saved"
        if entry.size != tensor.shape:
            raise CheckpointError(
                f"{path}: tensor '{name}' has shape {tuple(entry.size)}, the model's is {tuple(tensor.shape)}"
            )


def _read_tensors(path: Path, into: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    if group is None:
        _expect_a_single_process()
    try:
        dcp.load(
            dict(into),
            storage_reader=dcp.FileSystemReader(path),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise CheckpointError(f"can't read {path}: {_reason(error)}") from error


def _expect_a_single_process() -> None:
    """Silences torch, which warns that there is one although we say so."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def _attempt(work: Callable[[], T]) -> tuple[T | None, CheckpointError | None]:
    try:
        return work(), None
    except CheckpointError as error:
        return None, error
    except OSError as error:
        return None, CheckpointError(f"{error.filename or 'checkpoint'}: {error.strerror or error}")


def _reason(error: BaseException) -> str:
    """One line for what stopped a background save."""
    if isinstance(error, CheckpointException):
        rank = min(error.failures)
        return f"rank {rank}: {_reason(error.failures[rank][0])}"
    if isinstance(error, OSError):
        text = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        return text if error.filename is None else f"{error.filename}: {text}"
    return next(iter(str(error).splitlines()), type(error).__name__)

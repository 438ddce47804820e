"""A run's directory: one live owner, a metrics file with one row a step, and states that are whole or absent.

    out_dir/metrics.jsonl          one JSON object per logged step
    out_dir/bad-batch/             the last batch whose loss or gradient wasn't finite
    out_dir/checkpoints/           training: what a run goes on from
    out_dir/state-000050/          tuning: state.json + state.safetensors; written under another name, then renamed
    out_dir/adapter/               tuning: the exits, as every tool of eellm reads them

A state's name appears only when it is complete, so that a process killed at any moment leaves the one before.
One process of a run holds the directory (rank 0) and tells the others whether it could; all may read its states.
"""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from eellm.checkpoint.files import read_json, read_tensors, replacing, write_json, write_tensors
from eellm.errors import EellmError, RunError
from eellm.parallel.mesh import World


class RunDir:
    """Holds `out_dir` for this process until it ends."""

    def __init__(self, path: Path) -> None:
        """Raises RunError where a live run holds the directory."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however the process ends
        except BlockingIOError:
            raise RunError(f"{path} is in use by a run that is alive; wait for it, or set another out_dir") from None

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def save_state(self, step: int, data: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Writes the state after `step`; older ones go when it is there."""
        older = self._states()
        with replacing(_state(self.path, step), marker="state.json") as temporary:
            write_tensors(temporary / "state.safetensors", tensors)
            write_json(temporary / "state.json", {"step": step, **data})
        for state in older:
            if state != _state(self.path, step):
                _remove(state)

    def load_state(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The newest state, if there is one."""
        states = self._states()
        if not states:
            return None
        data = read_json(states[-1] / "state.json")
        return data, state_tensors(self.path, data["step"])

    def start_anew(self) -> None:
        """Forgets what an earlier run left: states, checkpoints, metrics, its name at Weights & Biases."""
        for directory in (*self._states(), self.checkpoints, self.path / "bad-batch"):
            if directory.exists():
                _remove(directory)
        self.metrics.unlink(missing_ok=True)
        (self.path / "wandb-id").unlink(missing_ok=True)

    def save_bad_batch(self, step: int, tensors: dict[str, Tensor]) -> Path:
        """Keeps the batch of a step that was skipped, in place of an earlier one. Returns its directory."""
        directory = self.path / "bad-batch"
        with replacing(directory, marker="batch.json") as temporary:
            write_tensors(temporary / "batch.safetensors", tensors)
            write_json(temporary / "batch.json", {"step": step})
        return directory

    def keep_metrics_up_to(self, step: int) -> None:
        """Drops rows beyond `step` and a torn last line, so that after a resume each step has one row."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.metrics)

    def _states(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.path.glob("state-*"), key=lambda path: (len(path.name), path.name))


def hold(path: Path, world: World) -> RunDir | None:
    """The run's directory, on rank 0. Raises RunError on every rank where another run holds it."""
    run_dir, refusal = None, None
    if world.is_main:
        try:
            run_dir = RunDir(path)
        except EellmError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"{error.filename or path}: {error.strerror or error}"
    refusal = world.share(refusal)
    if refusal is not None:
        raise RunError(str(refusal))
    return run_dir


def state_tensors(path: Path, step: int) -> dict[str, Tensor]:
    """What the state after `step` in the run's directory `path` holds."""
    return dict(read_tensors(_state(path, step) / "state.safetensors"))


def _state(path: Path, step: int) -> Path:
    return path / f"state-{step:06d}"


def _remove(directory: Path) -> None:
    """NOTE renamed first: a process killed meanwhile must not leave half a state under the name of a whole one."""
    hidden = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)  # left by such a process
    shutil.rmtree(directory.rename(hidden))

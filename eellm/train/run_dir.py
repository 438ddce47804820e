"""A run's directory: one live owner, a metrics file with one row a step, and states that are whole or absent.

    out_dir/metrics.jsonl          one JSON object per logged step
    out_dir/state-000050/          state.json + state.safetensors; written under another name, then renamed
    out_dir/adapter/               the exits, as every tool of eellm reads them

A state's name appears only when it is complete, so that a process killed at any moment leaves the one before.
"""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from eellm.checkpoint.files import read_json, read_tensors, replacing, write_json, write_tensors
from eellm.errors import RunError


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
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def save_state(self, step: int, data: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Writes the state after `step`; older ones go when it is there."""
        older = self._states()
        with replacing(self.path / f"state-{step:06d}", marker="state.json") as temporary:
            write_tensors(temporary / "state.safetensors", tensors)
            write_json(temporary / "state.json", {"step": step, **data})
        for state in older:
            if state.name != f"state-{step:06d}":
                shutil.rmtree(state)

    def load_state(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The newest state, if there is one."""
        states = self._states()
        if not states:
            return None
        return read_json(states[-1] / "state.json"), dict(read_tensors(states[-1] / "state.safetensors"))

    def start_anew(self) -> None:
        """Forgets states and metrics."""
        for state in self._states():
            shutil.rmtree(state)
        self.metrics.unlink(missing_ok=True)

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
        return sorted(self.path.glob("state-*"))

"""Where a run's numbers go: metrics.jsonl, TensorBoard where installed, and a progress bar on a terminal."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Row = dict[str, Any]


class MetricsLog:
    """A context manager; `write` takes one row per logged step."""

    def __init__(self, path: Path, *, num_steps: int, done: int = 0) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(path.parent / "tensorboard", done)
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("tuning", total=num_steps, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, row: Row) -> None:
        """Appends the row (it has a `step`) and shows its loss."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])
        self._progress.update(self._task, completed=row["step"], description=f"loss {row['loss']:.3f}")


def _tensorboard(directory: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional: extra eellm[tensorboard]
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=done + 1)

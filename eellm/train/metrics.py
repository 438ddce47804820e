"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases if asked, a progress line.

    {"step": 12, "loss": 5.1, "loss/exit_2": 5.6, "peak_memory_mb": [310.0, 290.5], ...}

One process of a run writes (rank 0); the others hold a log that drops its rows. A row is valid JSON: numbers that
aren't finite become null. TensorBoard and W&B see a list as `peak_memory_mb/0`, `peak_memory_mb/1`.
"""

import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eellm.errors import ConfigError

Row = dict[str, Any]


class Writer(Protocol):
    """Somewhere else that takes the numbers of a step."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """A context manager; `write` takes one row per logged step."""

    def __init__(
        self,
        path: Path | None,
        *,
        num_steps: int,
        done: int = 0,
        title: str = "training",
        tensorboard: bool = False,
        wandb: str | None = None,
    ) -> None:
        """path: metrics.jsonl, what else is written goes beside it; None where another process writes. done: steps that
        the run has behind it. wandb: the project. Raises ConfigError where what is asked for isn't installed."""
        self._file = path.open("a", encoding="utf-8") if path else None
        self._writers = list(_open_writers(path.parent, done, tensorboard, wandb)) if path else []
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=path is None or not console.is_terminal)
        self._task = self._progress.add_task(title, total=num_steps, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        for writer in self._writers:
            writer.close()

    def write(self, row: Row) -> None:
        """Appends the row; it has a `step` and a `loss`, and values that are numbers or lists of numbers."""
        if self._file is None:
            return
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._file.flush()
        values = dict(_scalars(row))
        for writer in self._writers:
            writer.write(row["step"], values)
        speed = f", {row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else ""
        self._progress.update(self._task, completed=row["step"], description=f"loss {row['loss']:.3f}{speed}")


def check_writers(*, tensorboard: bool, wandb: str | None) -> None:
    """Raises ConfigError where what is asked for isn't installed.

    Every process asks before a run starts: one that fails alone would leave the others waiting.
    """
    if tensorboard and not has_tensorboard():
        raise ConfigError("train.tensorboard: it isn't installed; pip install 'eellm[tensorboard]', or leave it out")
    if wandb is not None:
        try:
            # NOTE `import wandb` alone would take a folder of its runs for the package
            from wandb import init  # noqa: F401  # pyrefly: ignore[missing-import]
        except ImportError:
            message = "Weights & Biases isn't installed; pip install 'eellm[wandb]', or leave it out"
            raise ConfigError(f"train.wandb = {wandb!r}: {message}") from None


def has_tensorboard() -> bool:
    """Whether TensorBoard is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401  optional: extra eellm[tensorboard]
    except ImportError:
        return False
    return True


def _open_writers(directory: Path, done: int, tensorboard: bool, wandb: str | None) -> Iterator[Writer]:
    check_writers(tensorboard=tensorboard, wandb=wandb)
    if tensorboard:
        yield _TensorBoard(directory / "tensorboard", done)
    if wandb is not None:
        yield _Wandb(directory, wandb)


class _TensorBoard:
    def __init__(self, directory: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=done + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """NOTE W&B ignores steps that it has already; after a resume these come again, with the same values."""

    def __init__(self, directory: Path, project: str) -> None:
        import wandb  # pyrefly: ignore[missing-import]  optional: extra eellm[wandb]

        file = directory / "wandb-id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(project=project, dir=str(directory), id=file.read_text(encoding="utf-8"), resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, list | tuple):
            yield from ((f"{name}/{index}", item) for index, item in enumerate(value))
        elif name != "step":
            yield name, value

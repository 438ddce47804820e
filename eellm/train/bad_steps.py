"""Steps whose loss or gradient isn't finite: skipped, counted, and too many in a row end the run.

All ranks must record the same, so the caller first agrees with the others whether a step was finite.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eellm.errors import RunError


@dataclass(kw_only=True)
class BadSteps:
    """Counts skipped steps."""

    limit: int
    """Bad steps in a row that end the run."""
    batch: Path
    """Where the batch of the last bad step is kept, for the message."""
    skipped: int = 0
    """All steps skipped so far, for the metrics."""
    in_a_row: int = 0
    """Bad steps since the last good one."""

    def record(self, step: int, *, finite: bool, overflow: bool = False) -> None:
        """overflow: the loss was finite, and a smaller loss scale may make the gradients so; the step is skipped, but
        doesn't count towards the limit. Raises RunError for the last bad step that is allowed."""
        if finite:
            self.in_a_row = 0
            return
        self.skipped += 1
        if overflow:
            return
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            times = f"{self.limit} in a row"
            raise RunError(
                f"step {step}: the loss or the gradient is not finite, {times}; lower optim.lr or look at the batch in "
                f"{self.batch}, then run again (it resumes from the last checkpoint)"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

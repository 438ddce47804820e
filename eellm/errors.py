"""Every error that a user can cause, as one small tree. Bugs are `assert`s; these are not.

EellmError
├── ConfigError          a field of a config, recipe or command line has a wrong name or value
├── CheckpointError      a model or adapter directory can't be read or written as asked
│   ├── UnsupportedError     ... it is of an architecture, tensor type or version that we don't know
│   └── BaseMismatchError    ... the adapter was made for another base model
├── ScheduleError        the orders of a pipeline schedule can't be run
├── DataError            a text or token file is missing, empty or malformed
├── RequestError         a prompt or a generation option can't be served
├── CertificateError     a risk is asked for that no certificate of these weights covers
├── ModelError           a model's logits are no numbers: nothing can be said of them
├── WorkerError          a process that an engine needs has died or hangs; what was running has failed
└── RunError             a training run can't start or go on (directory in use, nothing to resume, NaN)

Each message says what is wrong, with the offending value, and what to do about it. The command line prints it on
one line and exits with code 2.
"""

import difflib
from collections.abc import Iterable


class EellmError(Exception):
    """Base of all errors that the user of `eellm` can cause and mend."""


class ConfigError(EellmError):
    """A field of a config, recipe or command line has a wrong name or value."""


class CheckpointError(EellmError):
    """A model or adapter directory can't be read or written as asked."""


class UnsupportedError(CheckpointError):
    """The files are of an architecture, tensor type or format version that this release doesn't know."""


class BaseMismatchError(CheckpointError):
    """The adapter's exits were made for another base model."""


class ScheduleError(EellmError):
    """The orders of a pipeline schedule can't be run: an action is missing, twice, too early or on a wrong rank."""


class DataError(EellmError):
    """A text or token file is missing, empty or malformed."""


class RequestError(EellmError):
    """A prompt or a generation option can't be served."""


class CertificateError(EellmError):
    """A risk is asked for that no certificate of these weights covers."""


class ModelError(EellmError):
    """A model's logits are no numbers (NaN), so that it says nothing: its weights are damaged, or too large for their
    dtype."""

    @classmethod
    def no_numbers(cls, layer: int) -> "ModelError":
        """What the exit after that layer says; the last layer's is the final exit."""
        return cls(
            f"the logits of the exit after layer {layer} are no numbers (NaN): the weights are damaged, or what they "
            "make of this text is too large for their dtype; load the model in float32, or leave the exit out"
        )


class WorkerError(EellmError):
    """A process that an engine needs has died, hangs or didn't start. Its requests have failed; make a new engine."""


class RunError(EellmError):
    """A training run can't start or go on."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the choice nearest to `word`, or the empty string where none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""

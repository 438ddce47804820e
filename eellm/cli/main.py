"""`eellm VERB …`: one module per verb, imported when it is named, so that help and mistakes cost no torch import.

Data goes to stdout, logs to stderr. Exit codes: 0, 2 for what the user can mend (one line says what), 130 for Ctrl-C.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

from eellm.errors import ConfigError, EellmError, did_you_mean
from eellm.log import log_to_stderr

VERBS = {
    "prepare": ("eellm.cli.prepare", "turn text into token shards for training; train a tokenizer"),
    "import": ("eellm.cli.import_", "read a Hugging Face directory or .gguf file, write a Hugging Face directory"),
    "add-exits": ("eellm.cli.add_exits", "give a model early exits, as an adapter directory"),
    "train": ("eellm.cli.train", "train a model with early exits, in one process or in many"),
    "tune": ("eellm.cli.tune", "train the exits of a model whose backbone is frozen (EE-Tuning)"),
    "plan": ("eellm.cli.plan", "what a training run will cost: time, idle time, memory, each exit; the best layout"),
    "export": ("eellm.cli.export", "write a training run's checkpoint as a Hugging Face directory with exits"),
    "generate": ("eellm.cli.generate", "continue a prompt, each token leaving at the first exit that is sure enough"),
    "serve": ("eellm.cli.serve", "answer OpenAI's clients over HTTP, each token leaving where it may"),
    "bench": ("eellm.cli.bench", "measure how fast a model decodes here: methods, batch sizes, 8 and 4 bits"),
    "calibrate": ("eellm.cli.calibrate", "learn thresholds whose risk is shown to stay below a bound"),
    "evaluate": ("eellm.cli.evaluate", "measure each exit on a text; quality against speed over thresholds"),
    "suit": ("eellm.cli.suit", "say whether a model suits early exits here, and after which layers they would go"),
    "tasks": ("eellm.cli.tasks", "ask lm-eval's tasks, at full depth and under exit rules, with intervals"),
}


def main(args: list[str] | None = None) -> int:
    """Runs one verb; returns the process's exit code."""
    try:
        try:
            _run(sys.argv[1:] if args is None else args)
        finally:
            sys.stdout.flush()  # at the process's end nobody could say that it failed
    except EellmError as error:
        print(f"eellm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our stdout has left: nothing to say, and nowhere to say it
        _forget_output()
        return 0
    except OSError as error:  # what the machine refuses: permissions, a full disk, a file where a directory should be
        _forget_output()
        print(f"eellm: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return
    if args[0] == "--version":
        print(import_module("eellm").__version__)
        return
    log_to_stderr()
    if args[0] not in VERBS:
        kind, known = ("option", ("--help", "--version")) if args[0].startswith("-") else ("command", VERBS)
        raise ConfigError(f"unknown {kind} '{args[0]}'{did_you_mean(args[0], known)}; see 'eellm --help'")
    import_module(VERBS[args[0]][0]).main(args[1:])


def _forget_output() -> None:
    """What stdout still holds goes nowhere, where it can't go where it should: else Python tries again at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _help() -> str:
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb:{width}}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(["usage: eellm COMMAND …", "", *lines, "", "eellm COMMAND --help lists a command's options."])

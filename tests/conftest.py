"""Tiny models are fastest on one thread, and a test's time then depends less on what runs beside it."""

import os

import hypothesis
import pytest
import torch

from eellm.log import log

torch.set_num_threads(1)

# How long an example takes depends on what else the machine does. Each run tries other examples, but where a change is
# judged (`.ci/run`): what fails there must fail here too.
hypothesis.settings.register_profile("eellm", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("eellm")


@pytest.fixture(autouse=True)
def _own_handlers():
    """A command that a test runs in this process must not write to that test's stderr for ever after."""
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before

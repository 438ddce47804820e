"""A command that a test runs in this process must not write to that test's stderr for ever after."""

import pytest

from eellm.log import log


@pytest.fixture(autouse=True)
def _own_handlers():
    before = log.handlers, log.level
    yield
    log.handlers, log.level = before

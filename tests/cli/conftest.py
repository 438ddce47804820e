"""What tests of commands share."""

import pytest

from eellm.cli.main import main


@pytest.fixture
def command(capfd):
    """Runs `eellm` with these arguments: exit code, stdout, stderr."""

    def call(*args):
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return code, out, err

    return call

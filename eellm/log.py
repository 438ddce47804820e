"""One logger for the package. Logs go to stderr: stdout belongs to data."""

import logging

log = logging.getLogger("eellm")


def log_to_stderr(*, verbose: bool = False) -> None:
    """Sends the package's log to stderr. Called by the command line only: a library stays silent."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)

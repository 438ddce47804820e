"""One logger for the package. Logs go to stderr: stdout belongs to data."""

import logging

log = logging.getLogger("eellm")


def log_to_stderr(*, verbose: bool = False) -> None:
    """Sends the package's log to stderr, once however often it is called: by the command line only, as a library stays
    silent."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False  # a library that sets up the root logger would say everything again
    log.setLevel(logging.DEBUG if verbose else logging.INFO)

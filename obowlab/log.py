"""What obowlab's loggers print: sentences on standard error, warnings marked as such.

A module takes `logging.getLogger(__name__)`; a process that a person reads calls `log_to_stderr` once at its start.
"""

from __future__ import annotations

import functools
import logging
import sys


def log_to_stderr() -> None:
    """Show the messages of all loggers below `obowlab` on standard error; calling it again changes nothing."""
    logger = logging.getLogger("obowlab")
    if not logger.handlers:
        logger.addHandler(_Sentences())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # libraries that set up the root logger would print everything again


class _Sentences(logging.Handler):
    """Prints through rich on a terminal, and plain unwrapped lines into a file or pipe."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        return f"Warning: {message}" if record.levelno == logging.WARNING else message

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr.isatty():
                _rich_handler().emit(logging.makeLogRecord({**vars(record), "msg": self.format(record), "args": None}))
            else:
                print(self.format(record), file=sys.stderr, flush=True)
        except OSError:  # the reader of the pipe is gone; the run is not
            self.handleError(record)


@functools.cache
def _rich_handler() -> logging.Handler:
    from rich.console import Console
    from rich.logging import RichHandler  # late: most commands have nothing to say here

    return RichHandler(console=Console(stderr=True), show_time=False, show_level=False, show_path=False)

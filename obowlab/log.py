"""What obowlab's loggers print: sentences on standard error, warnings marked as such; and terminals that are not UTF-8.

A module takes `logging.getLogger(__name__)`; a process that a person reads calls `log_to_stderr` once at its start.
"""

from __future__ import annotations

import codecs
import functools
import io
import logging
import sys

PLAIN = "obowlab-plain"
"""Name of the codec of terminals that know ASCII only, and of how others write what they do not know."""

_SPELLED = {
    **{"±": "+/-", "×": "x", "·": "*", "…": "...", "−": "-", "–": "-", "—": "-", "→": "->", "≥": ">=", "≤": "<=", "≈": "~"},
    **{"’": "'", "‘": "'", "“": '"', "”": '"', "κ": "kappa", "δ": "delta", "μ": "mu", "µ": "u", "°": " deg"},
    **{"✓": "yes", "✗": "no", "¹": "1", "²": "2", "³": "3"},
}


def log_to_stderr() -> None:
    """Show the messages of all loggers below `obowlab` on standard error; calling it again changes nothing."""
    show_anything()
    logger = logging.getLogger("obowlab")
    if not logger.handlers:
        logger.addHandler(_Sentences())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # libraries that set up the root logger would print everything again


def show_anything() -> None:
    """Let standard output and error spell what their encoding lacks (`+/-` for `±`), so that no letter ends a command."""
    _register()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != PLAIN:
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            # Under the name ASCII, click would take the encoding for a mistake and write UTF-8.
            stream.reconfigure(encoding=PLAIN if is_ascii else stream.encoding, errors=PLAIN)


@functools.cache
def _register() -> None:
    codecs.register_error(PLAIN, _spell)
    codecs.register(_plain_codec)


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    return "".join(_SPELLED.get(one) or one.encode("ascii", "backslashreplace").decode() for one in part), error.end


class _PlainEncoder(codecs.IncrementalEncoder):
    def encode(self, input: str, final: bool = False) -> bytes:
        return input.encode("ascii", PLAIN)


def _plain_codec(name: str) -> codecs.CodecInfo | None:
    if name.replace("_", "-") != PLAIN:
        return None
    ascii_codec = codecs.lookup("ascii")
    return codecs.CodecInfo(
        lambda text, errors="strict": (text.encode("ascii", PLAIN), len(text)),
        ascii_codec.decode,
        incrementalencoder=_PlainEncoder,
        incrementaldecoder=ascii_codec.incrementaldecoder,
        name=PLAIN,
    )


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

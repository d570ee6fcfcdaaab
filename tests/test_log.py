"""What obowlab's loggers print, and signals that are handled for a while."""

import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from obowlab.signals import on_signals

SPEAK = """
import logging
from obowlab.log import log_to_stderr
log_to_stderr()
log_to_stderr()
logging.basicConfig()  # as a library may do
logger = logging.getLogger("obowlab.launch.local")
logger.debug("not shown")
logger.info("%d of 3 are done.", 2)
logger.warning("x" * 300)
import sys
assert "rich" not in sys.modules, "importing it would make every command slower"
"""


def test_messages_are_plain_lines_on_stderr_and_warnings_are_marked() -> None:
    done = subprocess.run([sys.executable, "-c", SPEAK], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == f"2 of 3 are done.\nWarning: {'x' * 300}\n"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "1 +/- 2 x 3 isn't kappa \\xe9 \\u4e2d\n"),
        ("latin-1", "1 ± 2 × 3 isn't kappa é \\u4e2d\n"),
        ("utf-8", "1 ± 2 × 3 isn’t κ é 中\n"),
    ],
)
def test_no_letter_ends_a_command(encoding: str, shown: str) -> None:
    code = (
        "import click, sys; from obowlab.log import log_to_stderr; log_to_stderr(); log_to_stderr();"
        "t = '1 ± 2 × 3 isn’t κ é 中'; click.echo(t); print(t); click.echo(t, err=True)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "POSIX"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout.decode(encoding) == 2 * shown
    assert done.stderr.decode(encoding) == shown


def test_without_setup_a_library_user_gets_no_handler() -> None:
    assert not any(type(handler).__module__ == "obowlab.log" for handler in logging.getLogger().handlers)


def test_handlers_are_restored_and_other_threads_install_none() -> None:
    received: list[int] = []
    before = signal.getsignal(signal.SIGUSR1)
    with on_signals(lambda number, frame: received.append(number), (signal.SIGUSR1,)):
        os.kill(os.getpid(), signal.SIGUSR1)
        inner = signal.getsignal(signal.SIGUSR1)

        def elsewhere() -> None:
            with on_signals(lambda number, frame: None, (signal.SIGUSR1,)):
                assert signal.getsignal(signal.SIGUSR1) is inner
            received.append(0)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert received == [signal.SIGUSR1, 0]
    assert signal.getsignal(signal.SIGUSR1) is before

"""What obowlab's loggers print, and signals that are handled for a while."""

import logging
import os
import signal
import subprocess
import sys
import threading

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

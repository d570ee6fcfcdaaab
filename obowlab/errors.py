"""The one exception a user may see, and sentences on what the machine refuses: files and memory."""

import errno
import re

_ENDLESS = re.compile(r"(\S{100})\S{200,}")


class UserError(Exception):
    """Say in one sentence what is wrong and what to change; the command line prints it and exits with 2.

    Raise it for anything a user can fix: an unknown key, a missing file, a data set that was not prepared.
    Broken invariants are asserted instead.

    What it quotes may come from anywhere: unprintable characters are shown escaped, so that no terminal obeys them, and words of
    hundreds of characters are cut.
    """

    def __str__(self) -> str:
        """Return the sentence."""
        text = _ENDLESS.sub(r"\1...", super().__str__())
        return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


class AbsentError(UserError):
    """Say that this machine lacks what another one may have, images or GPUs: a dry run tells it and goes on."""


def refusal_of(error: OSError, *, file: object = None) -> str:
    """Return one sentence on what the operating system refuses.

    Args:
        error: what it said.
        file: the file or folder, where the error does not name the right one.
    """
    place = file or error.filename or "the disk"
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOSPC:
        reason += "; `df -h` and `df -i` show whether bytes or files ran out"
    return f"Cannot use {place} ({reason}): fix that and run the command again."


def memory_sentence(error: BaseException) -> str | None:
    """Return one sentence for an error that means that memory ran out, of the machine or of a GPU; None for another."""
    message = str(error).lower()
    marks: tuple[str, ...] = (
        "out of memory",
        "can't allocate memory",
        "cannot allocate memory",
        "not enough memory",
        "unable to allocate",
    )
    marks += ("bad_alloc", "could not create a primitive", "can't start new thread", "return without exception set")
    on_gpu = type(error).__name__ == "OutOfMemoryError" or "cuda" in message
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not is_memory and not (isinstance(error, RuntimeError | OSError | SystemError) and any(mark in message for mark in marks)):
        return None
    return (
        f"The memory of the {'GPU' if on_gpu else 'machine'} ran out: lower training.batch_size (--set), or --workers; in an "
        "evaluation, views.original_size and --workers decide. What was saved is kept, and the same command continues from there."
    )

"""The one exception a user may see."""

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

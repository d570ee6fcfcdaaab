"""The one exception a user may see."""


class UserError(Exception):
    """Say in one sentence what is wrong and what to change; the command line prints it and exits with 2.

    Raise it for anything a user can mend: an unknown key, a missing file, a data set that was not prepared.
    Broken invariants are asserted instead.
    """

"""What MLflow asks about every request that needs an account (login.ini): its own check of passwords, with a limit of attempts.

Caddy asks for the report and the studies the same way, and says what is to be done there: a reader only looks.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

WRITER = "writer"
"""The role that setup.py makes."""

WINDOW_S = 60.0
ATTEMPTS = 10
"""Wrong passwords for one account from one address in a window; the address may make five times as many for all accounts."""

REMEMBERED = 10_000
"""Addresses and logins that are remembered at most."""


class Attempts:
    """Counts wrong passwords by address and account.

    A login that was right before is never held up: a stranger who tries passwords for somebody's account cannot lock out who
    uses it, and from another address not even who comes for the first time. Each process of the server counts for itself.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._key = secrets.token_bytes(32)
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._wrong: OrderedDict[tuple[str, ...], tuple[float, int]] = OrderedDict()

    def wait_s(self, *, address: str, name: str, password: str) -> float:
        """Return how long this login has to wait, in seconds; 0 when it may be tried now."""
        with self._lock:
            if self._digest(name, password) in self._right:
                return 0.0
            return max(self._left_s((address,), limit=5 * ATTEMPTS), self._left_s((address, name), limit=ATTEMPTS))

    def note(self, *, address: str, name: str, password: str, right: bool) -> None:
        """Remember how a login went."""
        with self._lock:
            digest = self._digest(name, password)
            if right:
                self._right[digest] = None
                self._right.move_to_end(digest)
            else:
                self._right.pop(digest, None)
                for key in ((address,), (address, name)):
                    since, count = self._wrong.get(key, (0.0, 0))
                    if self._clock() - since >= WINDOW_S:
                        since, count = self._clock(), 0
                    self._wrong[key] = (since, count + 1)
                    self._wrong.move_to_end(key)
            for remembered in (self._right, self._wrong):
                while len(remembered) > REMEMBERED:
                    remembered.popitem(last=False)

    def _left_s(self, key: tuple[str, ...], *, limit: int) -> float:
        since, count = self._wrong.get(key, (0.0, 0))
        return max(0.0, since + WINDOW_S - self._clock()) if count >= limit else 0.0

    def _digest(self, name: str, password: str) -> bytes:
        return hmac.digest(self._key, hashlib.sha256(name.encode()).digest() + password.encode(), "sha256")


ATTEMPTS_SO_FAR = Attempts()


def authenticate() -> Any:
    """Return the login of the request of this moment, or the answer that it gets instead."""
    from flask import Response, request
    from mlflow.server import auth

    given = request.authorization
    if given is None or given.username is None or given.password is None:
        return auth.authenticate_request_basic_auth()
    # Caddy puts the address of who asked there, whatever they claimed; workers come directly, without.
    address = request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip() or str(request.remote_addr)
    login = {"address": address, "name": given.username, "password": given.password}
    wait_s = ATTEMPTS_SO_FAR.wait_s(**login)
    if wait_s:
        said = f"Too many wrong passwords; try again in {wait_s:.0f} s.\n"
        return Response(said, status=429, headers={"Retry-After": f"{wait_s:.0f}"}, mimetype="text/plain")
    found = auth.authenticate_request_basic_auth()
    right = not isinstance(found, Response)
    ATTEMPTS_SO_FAR.note(**login, right=right)
    if right and request.headers.get("X-Forwarded-Method", "GET") not in ("GET", "HEAD") and not _may_write(auth, given.username):
        return Response("This account may look at everything and change nothing.\n", status=403, mimetype="text/plain")
    return found


def _may_write(auth: Any, name: str) -> bool:
    user = auth.store.get_user(name)
    return user.is_admin or WRITER in [role.name for role in auth.store.list_user_roles(user.id)]

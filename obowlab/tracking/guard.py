"""Who may ask a server of `obowlab ui`: whoever has the token of this start, from the server's own pages.

Every user of a machine reaches its loopback interface, and so does every web page that one of them opens. A browser that opens
the printed address, which carries the token, gets a cookie; scripts send the token as password or bearer token.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

TOKEN_VARIABLE = "OBOWLAB_UI_TOKEN"
"""Carries the token to the server: a command line is seen by everybody on the machine, an environment is not."""

PARAMETER = "token"


def new_token() -> str:
    """Return a token for one start of a server: 32 random bytes."""
    return secrets.token_urlsafe(32)


@dataclass(frozen=True)
class Answer:
    """What a request gets instead of what it asked for.

    Attributes:
        status: HTTP status.
        text: plain text.
        headers: beside its type and length.
    """

    status: int
    text: str
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def all_headers(self) -> list[tuple[str, str]]:
        """Every header."""
        body = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(self.text.encode())))]
        return [*body, ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"), *self.headers]


FOREIGN = Answer(403, "This server answers its own pages and scripts that log in, not other web pages.\n")
UNKNOWN = Answer(401, "Open the address that `obowlab ui` printed: it carries the login of this start.\n")


@dataclass(frozen=True)
class Guard:
    """Decides about requests to one server.

    Attributes:
        token: of this start.
        name: of the cookie; browsers keep one jar for all ports of a host.
    """

    token: str
    name: str

    @classmethod
    def of_environment(cls, port: int) -> Guard:
        """Return the guard of a server that was given its token; the token is taken out of the environment.

        Raises:
            KeyError: it was given none.
        """
        return cls(os.environ.pop(TOKEN_VARIABLE), f"obowlab-{port}")

    def check(self, method: str, path: str, *, query: str, headers: Mapping[str, str]) -> Answer | None:
        """Return what a request gets instead of what it asked for; None lets it pass.

        Args:
            method: such as GET.
            path: as it was asked for, quoted.
            query: behind the `?`, quoted.
            headers: names in lower case.
        """
        if is_foreign(method, headers=headers):
            return FOREIGN
        pairs = parse_qsl(query, keep_blank_values=True)
        given = dict(pairs).get(PARAMETER)
        if method == "GET" and given is not None and self._fits(given):
            rest = urlencode([pair for pair in pairs if pair[0] != PARAMETER])
            there = "/" + path.lstrip("/") + ("?" + rest if rest else "")  # two slashes would be another host
            cookie = f"{self.name}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            return Answer(303, "", (("Location", there), ("Set-Cookie", cookie)))
        return None if any(map(self._fits, self._shown(headers))) else UNKNOWN

    def _fits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    def _shown(self, headers: Mapping[str, str]) -> Iterable[str]:
        """Yield what a request has to show for itself: a bearer token, a password, a cookie."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            yield given.strip()
        elif scheme.lower() == "basic":
            yield _decoded(given).partition(":")[2]
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.name)
        except CookieError:
            return
        if cookie is not None:
            yield cookie.value


def _decoded(given: str) -> str:
    try:
        return base64.b64decode(given, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def is_foreign(method: str, *, headers: Mapping[str, str]) -> bool:
    """Return whether a browser says that a page of another server asks; following a link is no such thing.

    Args:
        method: such as GET.
        headers: names in lower case.
    """
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return True
    followed = method == "GET" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return headers.get("sec-fetch-site") in ("cross-site", "same-site") and not followed


Scope = MutableMapping[str, Any]
AsgiApp = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]
WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def guarded_asgi(app: AsgiApp, *, guard: Guard) -> AsgiApp:
    """Return an ASGI application behind a guard; websockets, which browsers open across origins, are closed."""

    async def guarded(scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] == "http":
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
            answer = guard.check(scope["method"], path, query=scope["query_string"].decode("latin-1"), headers=headers)
            if answer is not None:
                encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.all_headers]
                await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
                await send({"type": "http.response.body", "body": answer.text.encode()})
                return
        await app(scope, receive, send)

    return guarded


def guarded_wsgi(app: WsgiApp, *, guard: Guard) -> WsgiApp:
    """Return a WSGI application behind a guard."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        headers = {key[5:].replace("_", "-").lower(): value for key, value in environ.items() if key.startswith("HTTP_")}
        answer = guard.check(
            environ["REQUEST_METHOD"], environ.get("PATH_INFO", "/"), query=environ.get("QUERY_STRING", ""), headers=headers
        )
        if answer is None:
            return app(environ, start_response)
        start_response(f"{answer.status} {'See Other' if answer.status == 303 else 'Refused'}", answer.all_headers)
        return [answer.text.encode()]

    return guarded

"""Values as text for people: durations, sizes, times, numbers, estimates, settings, commands; each in one form everywhere."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

ABSENT = "–"
"""What stands where there is no value."""


def duration(seconds: float | None) -> str:
    """Return a time as `45 s`, `12 min`, `3 h 20 min` or `2.1 days`; a dash where there is none."""
    if seconds is None:
        return ABSENT
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{seconds / 86400:.1f} days"


def size(num_bytes: float) -> str:
    """Return a number of bytes in decimal units: `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def timestamp(seconds: float, *, utc: bool = False) -> str:
    """Return a time in seconds since 1970 to the minute: local, or in UTC, which is the same on every machine."""
    if utc:
        return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def number(value: float) -> str:
    """Return a number of at most four digits: `0.05`, `1200`, `−3.25`, `1.2e−5`."""
    if value == 0:
        return "0"
    magnitude = float(f"{abs(value):.4g}")
    if 1e-3 <= magnitude < 1e5:
        text = f"{magnitude:.10f}".rstrip("0").rstrip(".")
    else:
        mantissa, _, power = f"{magnitude:.2e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return text.replace("-", "−") if value > 0 else f"−{text.replace('-', '−')}"


def estimate(value: float | None, half_width: float | None = None, *, signed: bool = False, digits: int = 2) -> str:
    """Return a value and the half-width of its interval, in percent: `8.82 ± 0.50`; a dash where there is no value."""
    if value is None:
        return ABSENT
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text if half_width is None else f"{text} ± {half_width:.{digits}f}"


def measurement(values: Mapping[str, Any] | None, *, digits: int = 2) -> str:
    """Return a measurement of a results file: `8.82 ± 0.50`, or `97.25 [96.17, 98.03]` where the interval is not symmetric."""
    if values is None:
        return ABSENT
    value, half_width = values["value"], values["interval"]
    low, high = values.get("low", value - half_width), values.get("high", value + half_width)  # earlier versions have no ends
    if math.isclose(high - value, value - low, abs_tol=1e-9):
        return estimate(value, half_width, digits=digits)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def toml(value: Any) -> str:
    """Return a setting as a TOML file writes it; a number that was left open is "all"."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        return "[" + ", ".join(map(toml, value)) + "]"
    return '"all"' if value is None else json.dumps(value, ensure_ascii=False)  # JSON's numbers, texts and lists are TOML's


def override(value: Any) -> str:
    """Return a setting as `--set KEY=VALUE` takes it: as TOML, but plain words without their quotes."""
    text = "all" if value is None else value
    if isinstance(text, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", text) and text not in ("true", "false", "inf", "nan"):
        return text
    return toml(value)


def arguments(*positional: str, **options: object) -> tuple[str, ...]:
    """Return the arguments of another `obowlab` command: `arguments("run", "demo", seed=1)` is `run demo --seed 1`.

    Args:
        positional: the command and what it takes without a name.
        options: by name, `-` as `_`. None is left out, True and False are `--NAME` and `--no-NAME`, a tuple repeats the option.
    """
    found = list(positional)
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [part for each in (value if isinstance(value, tuple) else (value,)) for part in (f"--{flag}", str(each))]
    return tuple(found)


def width(text: str) -> int:
    """Return how many columns of a terminal a text takes: letters of East Asia two, accents that join the letter before none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text)


def printable(text: str) -> str:
    """Return a text in one line and without characters that a terminal would obey: those are shown escaped."""
    line = " ".join(text.split("\n"))
    return line if line.isprintable() else "".join(o if o.isprintable() else o.encode("unicode_escape").decode() for o in line)


def shorten(name: str, columns: int, *, mark: str = "…") -> str:
    """Return a name in at most so many columns, a mark for its middle; a run keeps seed and digits, and no number is cut."""
    if width(name) <= columns:
        return name
    found = re.search(r"-s\d+-[0-9a-f]{8}$", name)
    room = columns - len(mark)
    tail = len(found[0]) if found is not None and len(found[0]) < room else room // 3
    head = room - tail
    while head > 1 and name[head - 1 : head + 1].isdigit():
        head -= 1
    while tail > 1 and name[-tail - 1 : len(name) - tail + 1].isdigit():
        tail -= 1
    return f"{name[:head]}{mark}{name[-tail:]}"


def wrap(text: str, columns: int) -> list[str]:
    """Return a text as lines of at most so many columns, broken at spaces, else behind a sign, else between letters.

    A number is never broken (`162 480`, `20 %`, `8.8 ± 0.5`, `1e-5`, a hash); one that is longer than a line has its own.
    """
    lines, rest = [], text
    while width(rest) > columns:
        fits = max(1, next(i for i in range(len(rest)) if width(rest[: i + 1]) > columns))
        numbers = [found.span() for found in _NUMBER.finditer(rest)]
        allowed = [i for i in range(1, len(rest)) if not any(start < i < end for start, end in numbers)]
        spaces = [i for i in allowed if i <= fits and rest[i] == " "]
        signs = [i for i in allowed if i <= fits and rest[i - 1] in "/_-=,:;"]
        within = [i for i in allowed if i <= fits]
        cut = (spaces or signs or within or [0])[-1] or next((i for i in allowed if i > fits), len(rest))
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*lines, rest] if rest or not lines else lines


_NUMBER = re.compile(
    r"[-+−]?\d[\d.,:]*(?:[eE][-+−]?\d+)?(?: \d{3}\b)*(?: ± [\d.]+)?(?: (?:%|[kMGT]?B|min|ms|s|h|days)(?!\w))?|[0-9a-f]{8,}"
)
"""A number with what belongs to it, or a hash."""


_LOCAL = ("sqlite", "journal", "file")
_ONE_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(?::\d*)?"
_HOST = re.compile(rf"{_ONE_HOST}(?:,{_ONE_HOST})*")
_PLACE = re.compile(r"[\w.~/%+-]*")
_UNKNOWN = "***"
_HARMLESS = ("sslmode", "connect_timeout", "application_name", "timeout", "mode", "uri", "charset")


def shown_uri(uri: str) -> str:
    """Return the scheme, host and database or path of an address: no user, no password, no parameter.

    Whatever cannot be told from a password for certain is `***`, as in `postgresql://***`.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return _UNKNOWN if re.search(r"[@=?]|://", uri) else uri
    place, *parameters = re.split(r"[?#]", rest, maxsplit=1)
    if scheme.partition("+")[0] in _LOCAL and place.startswith("/"):
        return f"{scheme}://{place}"
    host, slash, path = place.rpartition("@")[2].partition("/")
    if "@" in "".join(parameters) or not _HOST.fullmatch(host) or not _PLACE.fullmatch(path):
        return f"{scheme}://{_UNKNOWN}"
    return f"{scheme}://{host}{slash}{path}"


def is_shown_whole(uri: str) -> bool:
    """Return whether `shown_uri` knows where host and database of an address are."""
    return not shown_uri(uri).endswith(_UNKNOWN)


def without_secrets(message: str, *, uri: str) -> str:
    """Return a message with `shown_uri` in place of the address, and `***` in place of what its login and parameters hold.

    Args:
        message: of a driver or a server, which may repeat any part of the address, quoted or not.
        uri: the address.
    """
    shown = shown_uri(uri)
    rest = uri.partition("://")[2]
    login = "" if rest.startswith("/") else rest.rpartition("@")[0]  # without a host it is a path, whatever is in its name
    secrets = {login, login.partition(":")[2]}
    for found in re.finditer(r"(\w*)=", rest):
        if found[1] not in _HARMLESS:  # a value that should have been quoted may end at none of these
            behind = rest[found.end() :]
            secrets |= {behind, re.split(r"&\w+=", behind)[0], re.split(r"[?&;#]", behind)[0]}
    plain = {read(secret) for secret in secrets for read in (str, unquote, unquote_plus)}
    written = (str, quote, partial(quote, safe=""), quote_plus, lambda secret: repr(secret)[1:-1])
    whole = {write(secret) for secret in plain for write in written}
    pieces = {piece for secret in whole for piece in re.split(r"[^\w.~+$!-]+", secret)}
    hidden = sorted((each for each in whole | pieces if len(each) >= 3), key=len, reverse=True)
    parts = message.replace(uri, shown).split(shown)
    for secret in hidden:
        parts = [part.replace(secret, _UNKNOWN) for part in parts]
    host = re.split(r"[:/,]", shown.partition("://")[2], maxsplit=1)[0]
    if login and host and host != _UNKNOWN:  # a driver takes what stands behind the first of two @ for a part of the host
        parts = [re.sub(rf"[^\s'\"]*@(?={re.escape(host)})", "", part) for part in parts]
    return shown.join(re.sub(r"://[^\s'\"]*@", "://", part) for part in parts)

"""`make gpu-check`: is obowlab right on this GPU, and how fast? One table, gpu-check.json and profiler traces (docs/gpu.md).

    python -m tests.gpu.check                     all parts, at most 8 minutes
    python -m tests.gpu.check --only step render  these parts
    python -m tests.gpu.check --try-on-cpu        the same code on the CPU, at sizes at which the numbers mean nothing

Parts are processes of their own with a time limit each; one that fails or is stopped leaves what it measured, and the others
run. Files go to $OUT, or to `gpu-check/`. Exit code: 0; 1 when a test failed or a part did not end well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.gpu import OUTCOMES_VARIABLE
from tests.gpu.speed import PARTS, Row

ROOT = Path(__file__).resolve().parents[2]
LIMITS_S = {
    "correctness": 200,
    "step": 150,
    "detector": 60,
    "evaluation": 60,
    "render": 40,
    "loader": 90,
    "compiled": 120,
    "demo": 120,
}
"""Most seconds of each part, in the order in which they run; what takes longer than was planned leaves less to the last ones."""

MOST_GB = {"full, peak memory at 64 images, GB": 20.0}
STEP_RATE, LOADER_RATE = "full, bfloat16: images/s", "loader + render: images/s"
MARGIN = 1.2
"""How much faster than the step the loader must be."""

GRACE_S = 5.0
"""From the request to stop to SIGKILL."""

SKIPPED = "skipped: no NVIDIA GPU (torch sees none)"


# ------------------------------------------------------------------------------------------------------------------ parts


def run_part(words: list[str], *, log: Path, limit_s: float, environment: Mapping[str, str]) -> str:
    """Run a command with its output in a file, at most so long, and kill what it leaves; return what went wrong, or nothing."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # lets it end what it has started, in groups of their own perhaps
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            return f"stopped after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return ""
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {last[-1].strip()[:200] if last else 'no output'}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a file, which may be missing or end in the middle of one."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def outcomes(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how every test ended, by its name: of several lines the last counts, but a failure of its end is a failure."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        found[line["test"].split("/")[-1]] = line
    return found


def rows_of_tests(found: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return a row for how many tests passed, and for every number that they recorded."""
    counts = Counter(line["outcome"] for line in found.values())
    ran = counts["passed"] + counts["failed"] + counts["stopped"]
    note = f"{counts['passed']} passed, {counts['skipped']} skipped"
    rows = [Row("tests that failed", float(ran - counts["passed"]) if ran else None, most=0.0, note=note)]
    for line in found.values():
        for name, value in (line.get("numbers") or {}).items():
            rows.append(Row(name.removesuffix(", GB"), float(value), "GB", most=MOST_GB.get(name)))
    return rows


def correctness(out: Path, *, limit_s: float, on_gpu: bool) -> tuple[list[Row], str, dict[str, Any]]:
    """Play the tests of this folder; return rows, what went wrong, and how each test ended."""
    lines, log = out / "tests.jsonl", out / "correctness.log"
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    environment = {OUTCOMES_VARIABLE: str(lines)} | ({"OBOWLAB_TEST_GPU": "1"} if on_gpu else {})
    problem = run_part(words, log=log, limit_s=limit_s, environment=environment)
    found = outcomes(read_lines(lines))
    lines.unlink(missing_ok=True)
    return rows_of_tests(found), problem, found


def speed(part: str, out: Path, *, limit_s: float, on_gpu: bool) -> tuple[list[Row], str]:
    """Measure a part; return its rows and what went wrong."""
    path = out / f"{part}.jsonl"
    words = [sys.executable, "-m", "tests.gpu.speed", part, str(path), *([] if on_gpu else ["--try-on-cpu"])]
    problem = run_part(words, log=out / f"{part}.log", limit_s=limit_s, environment={})
    rows = [Row(**line) for line in read_lines(path)]
    path.unlink(missing_ok=True)
    return rows, problem


def with_loader_target(rows: list[Row]) -> list[Row]:
    """Let the loader be faster than the step that was measured, where one was."""
    measured = next((row.value for row in rows if row.name == STEP_RATE and row.value), None)
    if measured is None:
        return rows
    return [replace(row, least=round(MARGIN * measured)) if row.name == LOADER_RATE else row for row in rows]


# ----------------------------------------------------------------------------------------------------------------- report


def facts(*, on_gpu: bool) -> dict[str, Any]:
    """Return on what machine and of what code the numbers are."""
    import torch

    from obowlab.runs import provenance

    found: dict[str, Any] = {"card": "none: tried on the CPU", "driver": None, "gpus": 0}
    if on_gpu:
        found = {"card": torch.cuda.get_device_name(), "driver": driver(), "gpus": torch.cuda.device_count()}
    code = provenance.code()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    commit = {"commit": code.commit, "dirty": code.dirty}
    return {**found, **versions, "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), **commit}


def driver() -> str | None:
    """Return the version of NVIDIA's driver, if it tells."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # a fact that may be missing
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def number(value: float | None, unit: str) -> str:
    """Return a value with four significant digits at most and its unit."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 1000 or float(value).is_integer() else 3 if abs(value) < 10 else 1
    return f"{value:.{digits}f} {unit}".strip()


def target(row: Row) -> str:
    """Return what a row should be."""
    texts = [f"{sign} {number(bound, row.unit)}" for sign, bound in (("≥", row.least), ("≤", row.most)) if bound is not None]
    return ", ".join(texts)


def verdict(row: Row, *, on_gpu: bool) -> str:
    """Return whether a row is as it should be; on a CPU no number says that."""
    return row.verdict if on_gpu else ""


def table(found: Mapping[str, list[Row]], *, title: str, on_gpu: bool) -> Table:
    """Return all rows as one table."""
    made = Table(title=title, title_justify="left")
    for name, side in (
        ("part", "left"),
        ("what", "left"),
        ("value", "right"),
        ("target", "right"),
        ("", "left"),
        ("note", "left"),
    ):
        made.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    colours = {"ok": "green", "missed": "red", "not measured": "yellow"}
    for part, rows in found.items():
        for index, row in enumerate(rows):
            word = verdict(row, on_gpu=on_gpu)
            shown = f"[{colours[word]}]{word}[/]" if word else ""
            made.add_row(part if index == 0 else "", row.name, number(row.value, row.unit), target(row), shown, row.note)
        made.add_section()
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(LIMITS_S), default=list(LIMITS_S), help="run these parts")
    parser.add_argument("--minutes", type=float, default=8.0, help="most minutes of all parts together")
    parser.add_argument("--try-on-cpu", action="store_true", help="the same code on the CPU, at tiny sizes")
    given = parser.parse_args(arguments)
    parts = [part for part in LIMITS_S if part in given.only]
    assert PARTS.keys() | {"correctness"} == LIMITS_S.keys()
    import torch

    on_gpu = not given.try_on_cpu
    if on_gpu and not torch.cuda.is_available():
        for part in parts:
            print(f"{part}: {SKIPPED}")
        return 0
    out = Path(os.environ.get("OUT") or ROOT / "gpu-check").absolute()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    report: dict[str, Any] = {**facts(on_gpu=on_gpu), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parts": {}}
    rows: dict[str, list[Row]] = {}
    tests: dict[str, Any] = {}
    for part in parts:
        left = 60 * given.minutes - (time.monotonic() - began) - 2 * GRACE_S
        limit_s = min(LIMITS_S[part], left)
        started = time.monotonic()
        print(f"{part}: at most {max(0.0, limit_s):.0f} s", file=sys.stderr, flush=True)
        if left < 10:
            rows[part], problem = [], f"no time left of {given.minutes:g} minutes"
        elif part == "correctness":
            rows[part], problem, tests = correctness(out, limit_s=limit_s, on_gpu=on_gpu)
        else:
            rows[part], problem = speed(part, out, limit_s=limit_s, on_gpu=on_gpu)
        report["parts"][part] = {"seconds": round(time.monotonic() - started, 1), "problem": problem}
        if problem and not (part == "correctness" and problem.startswith("exit code 1") and tests):
            rows[part].append(Row("the rest of this part", None, note=problem))
        # Written after every part: whoever stops this keeps what there is.
        ordered = iter(with_loader_target([row for each in rows.values() for row in each]))
        rows = {name: [next(ordered) for _ in each] for name, each in rows.items()}
        flat = [(name, row) for name, each in rows.items() for row in each]
        report["rows"] = [{"part": name, **asdict(row), "verdict": verdict(row, on_gpu=on_gpu)} for name, row in flat]
        report["tests"], report["seconds"] = tests, round(time.monotonic() - began, 1)
        (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    title = f"{report['card']}, driver {report['driver']}, torch {report['torch']}, commit {str(report['commit'])[:12]}"
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(rows, title=title, on_gpu=on_gpu))
    for name, line in tests.items():
        if line["outcome"] in ("failed", "stopped"):
            console.print(
                f"{line['outcome']}: {name}: {(line.get('words') or '').splitlines()[:1]}", markup=False, soft_wrap=True
            )
    console.print(f"{report['seconds']:.0f} s; numbers, logs and traces are in {out}", markup=False, soft_wrap=True)
    failed = any(line["outcome"] in ("failed", "stopped") for line in tests.values())
    return int(failed or any(each["problem"] for each in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())

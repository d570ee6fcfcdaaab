"""How long commands take on a full run store, and MLflow's list of its runs in a browser.

`python -m tests.benchmarks.bench_store [--store DIR] [--runs 200]`: every command is a process of its own, the first time and
again; seconds of wall time, and of processor time, which other work on the machine disturbs less. Without --store one is made
first (`store.py`), which takes a quarter of an hour, nearly all of it MLflow taking nearly five million values.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from obowlab.report.curves import CACHE
from obowlab.tracking.server import DATABASE
from tests.benchmarks import store as stores
from tests.browser import chromium, complaints

OBOWLAB = (sys.executable, "-m", "obowlab.cli")
PORT = 5057
ROWS_TIMEOUT_S = 120.0


def timed(*words: str) -> tuple[float, float]:
    """Run a command to its end and return its wall time and its processor time, in seconds."""
    began = time.perf_counter()
    process = subprocess.Popen([*OBOWLAB, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - began
    if status:
        raise SystemExit(f"obowlab {' '.join(words)}: {said}")
    return wall_s, used.ru_utime + used.ru_stime


def commands(store: Path, *, out: Path, in_mlflow: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a title and the words of every command that is timed."""
    run = min(path.parent.name for path in store.glob("*/run.json"))
    here = ("--runs-root", str(store))
    yield "runs list", ("runs", "list", *here)
    yield "table table3 --scale tiny", ("table", "table3", "--scale", "tiny", *here)
    yield "table all --scale tiny", ("table", "all", "--scale", "tiny", *here)
    yield "report", ("report", "--out", str(out), *here)
    yield "runs show RUN", ("runs", "show", run, *here)
    yield "config list", ("config", "list")
    yield "--help", ("--help",)
    if in_mlflow:
        yield "runs sync, nothing new", ("runs", "sync", *here)


def settle(store: Path) -> None:
    """Wait until a report that is sent in the background has been sent: it would disturb what is timed next."""
    log, seen = store / ".logs" / "report.log", -1
    while log.exists() and (size := log.stat().st_size) != seen:
        seen = size
        time.sleep(6.0)


@contextmanager
def served(store: Path) -> Iterator[str]:
    """Run `obowlab ui` and yield its address once it answers."""
    server = subprocess.Popen(
        [*OBOWLAB, "ui", "--port", str(PORT), "--runs-root", str(store)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert server.stdout is not None
    try:
        assert b"MLflow UI" in server.stdout.readline()
        yield f"http://127.0.0.1:{PORT}"
    finally:
        server.terminate()
        server.wait()


def browse(store: Path, *, profile: Path) -> None:
    """Print how long MLflow's list of runs takes to show its rows, the first time and again."""
    names = {path.parent.name for path in store.glob("*/run.json")}
    with served(store) as address, chromium(profile) as browser:
        for title in ("MLflow's list of runs, rows shown", "  again"):
            browser.get("about:blank")
            browser.get_log("browser")
            began = time.perf_counter()
            browser.get(f"{address}/#/experiments/1/runs")
            shown = 0
            while not shown and time.perf_counter() - began < ROWS_TIMEOUT_S:
                text = browser.execute_script("return document.body.innerText")
                shown = sum(name in text for name in names)
                time.sleep(0.05)
            wall_s = time.perf_counter() - began
            time.sleep(1.0)
            errors = [message for message in complaints(browser) if "favicon" not in message]
            if not shown:
                raise SystemExit(f"MLflow showed no run within {ROWS_TIMEOUT_S:.0f} s; its console: {errors}")
            print(f"{title:<36} {wall_s:>6.2f}         {shown} rows in sight, {len(errors)} messages on the console", flush=True)
            for message in errors:
                print(f"    {message[:200]}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="one that store.py made; it is changed only as commands change it")
    parser.add_argument("--runs", type=int, default=stores.RUNS, help="of a store that is made (default: %(default)s)")
    parser.add_argument("--no-mlflow", action="store_true", help="make a store without MLflow; leave sync and the browser out")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="obowlab-bench-") as scratch:
        store, out = options.store, Path(scratch) / "report"
        if store is None:
            store = Path(scratch) / "runs"
            stores.main([str(store), "--runs", str(options.runs), *(["--no-mlflow"] if options.no_mlflow else [])])
        in_mlflow = (store / DATABASE).exists()
        print(f"{sum(1 for _ in store.glob('*/run.json'))} runs; load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
        print(f"{'obowlab ...':<36} {'wall, s':>6} {'cpu, s':>7}   again: {'wall':>5} {'cpu':>6}")
        for title, line in commands(store, out=out, in_mlflow=in_mlflow):
            first, again = [(timed(*line), settle(store))[0] for _ in range(2)]
            print(f"{title:<36} {first[0]:>6.2f} {first[1]:>7.2f}          {again[0]:>5.2f} {again[1]:>6.2f}", flush=True)
        shutil.rmtree(store / CACHE)
        wall_s, cpu_s = timed("report", "--out", str(out), "--runs-root", str(store))
        print(f"{'report, nothing in its cache':<36} {wall_s:>6.2f} {cpu_s:>7.2f}", flush=True)
        settle(store)
        if in_mlflow:
            browse(store, profile=Path(scratch) / "chromium")
    return 0


if __name__ == "__main__":
    sys.exit(main())

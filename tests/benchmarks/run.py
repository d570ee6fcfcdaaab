"""Run every benchmark, one after another, each as a process of its own: `make bench [PHOTOS=folder or .tar] [STORE=folder]`.

PHOTOS is an ImageFolder (CLASS/*.JPEG) of full-size photographs, or a .tar of one. Without it the archive photos200.tar is looked
for where the tests look; without that the loaders are left out. STORE is a run store that `tests/benchmarks/store.py` made.
Without it one is made, and MLflow's part is left out, as filling that takes a quarter of an hour. Figures are ratios taken side
by side: run it on an idle machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
STORE = os.environ.get("STORE", "")


def photos(scratch: Path) -> Path | None:
    """Return a folder CLASS/*.JPEG of photographs, unpacked if need be, or None."""
    folder = os.environ.get("OBOWLAB_TEST_PHOTOS") or HERE.parents[2] / "shared" / "data"
    source = Path(os.environ.get("PHOTOS") or Path(folder) / "photos200.tar")
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(scratch, filter="data")
        source = scratch
    first = next(source.rglob("*.JPEG"), None) if source.is_dir() else None
    return first.parent.parent if first else None


def bench(title: str, script: str, *arguments: str) -> int:
    print(f"\n=== {title}", flush=True)
    threads = str(len(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run([sys.executable, str(HERE / script), *arguments], env=environment, check=False).returncode


def main() -> int:
    threads = ("--threads", str(len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as scratch:
        folder = photos(Path(scratch))
        failures = 0
        if folder is None:
            print("No photographs: the loaders are left out. Give PHOTOS=a folder CLASS/*.JPEG, or a .tar of one.")
        else:
            failures += bench("Loaders: images/s on the full recipe's views", "bench_loader.py", "--photos", str(folder))
            failures += bench(
                "Colours: difference to torchvision on PIL", "bench_loader.py", "--photos", str(folder), "--equivalence"
            )
        failures += bench("One step against its own encoder work, batch 16", "bench_step.py", "--batch-size", "16", *threads)
        failures += bench("One step, batch 64", "bench_step.py", "--batch-size", "64", "--rounds", "3", *threads)
        failures += bench("A detector's step beside torchvision's", "bench_detector.py", *threads)
        failures += bench("Peak memory of the BoW targets", "bench_targets.py", *threads)
        failures += bench("Few-shot episodes", "bench_fewshot.py")
        failures += bench("Linear probe, k-NN and Sinkhorn beside their obvious alternatives", "bench_kernels.py", *threads)
        archive = Path(os.environ.get("OBOWLAB_TEST_PHOTOS") or HERE.parents[2] / "shared" / "data") / "tinyimagenet100.tar"
        quoted = ("--source", str(archive)) if archive.is_file() else ("--recipes", "demo")
        failures += bench("What a training is said to cost, and what it does", "bench_quote.py", *quoted)
        failures += bench("Scale: small files, data files at a start, a study of 1000 trials", "bench_scale.py")
        failures += bench(
            "Commands on a store of 200 runs", "bench_store.py", *(("--store", STORE) if STORE else ("--no-mlflow",))
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Prove that a checkout of obowlab trains the same bits as another one.

    python tests/bits.py CHECKOUT OUT_FOLDER [--quick] [--more] [--only CASE ...]     trains, prints hashes
    python tests/bits.py CHECKOUT OUT_FOLDER --against baseline.txt                   also says SAME or DIFFERENT for every line
    python tests/bits.py --explain OLD_OUT_FOLDER NEW_OUT_FOLDER                      says which tensors and numbers differ

CHECKOUT is a working tree of any version, for instance one of `git worktree add`. OBOWLAB_TEST_PHOTOS is a folder with
tinyimagenet100.tar, which the case on photographs needs; leave that case out with --only.

Standard output is a function of the code alone: `diff` two of them. Progress, times and errors go to standard error; logs,
runs and `details.json` (a hash of every tensor) to OUT_FOLDER, whose `data`, `runs` and `logs` are removed first.

A line of a run: NAME  steps=N  encoder=SHA  checkpoint=SHA  results=SHA  curves=SHA  run=RUN_ID
  encoder      names, types, shapes and bytes of all tensors of encoder.safetensors
  checkpoint   the same of every tensor in the newest checkpoint*.pt (student, teacher, heads, vocabulary or queue, and the
               optimiser's momenta), each under its path of keys
  results      protocol, subject, and name, value, interval, count of every measurement; no dates, no hashes of settings
  curves       every training point and online measurement in metrics.jsonl and online.jsonl, without what measures time
  run          the run's name, which ends in the fingerprint of recipe and seed
The first lines say on what CPU and with what torch: bits are comparable only where these are equal.

Exit code: 0 all cases ran (and are as in --against), 1 some failed or differ, 2 wrong arguments. Only obowlab's command line
is called.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

PHOTOS = Path(os.environ.get("OBOWLAB_TEST_PHOTOS", "")) / "tinyimagenet100.tar"
TIMING = {"images_per_s", "step_time_s", "data_wait_s"}
TIMEOUT_S = 3 * 3600

CHEAP = ("evaluation.linear.epochs=5", "evaluation.fewshot.num_episodes=50")
"""Evaluation of the shortened cases: all three protocols, trained and random weights, fewer epochs and episodes."""

SHORT = ("training.epochs=2", "training.batch_size=64", "data.images_per_class=30", *CHEAP)
"""60 classes x 30 images = 1800 images, // 64 = 28 steps an epoch, x 2 = 56 steps."""

THIRTY = ("training.epochs=2", "training.batch_size=64", "data.images_per_class=16", *CHEAP)
"""60 classes x 16 images = 960 images, // 64 = 15 steps an epoch, x 2 = 30 steps."""

SWAV = ("method.queue_size=128", "method.queue_start_step=5", "method.frozen_steps=10")
"""Within 30 steps the queue is full, and the prototypes move."""


@dataclass(frozen=True)
class Case:
    """One `obowlab run`.

    Attributes:
        recipe: its name.
        settings: for --set.
        options: further options.
        steps: how many the last stage must take.
        runs: how many run folders there must be, one a stage.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    steps: int = 0
    runs: int = 1


QUICK = {
    # 100 classes x 40 images = 4000 images, // 64 (the recipe's batch) = 62 steps, one epoch: exactly 62 steps, bfloat16.
    "tiny-vanilla": Case("tiny-vanilla", ("training.epochs=1", "data.images_per_class=40", *CHEAP), steps=62),
    "demo-vanilla": Case("demo-vanilla", SHORT, steps=56),
    "demo-full": Case("demo-full", SHORT, steps=56),
    # RotNet (its own 3 epochs), then BoWNet twice, 56 steps each; k-means of 64 words twice, with the recipe's points, iterations
    # and cutmix.
    "demo-bownet": Case("demo-bownet", SHORT, steps=56, runs=3),
    "demo-moco": Case("demo-moco", SHORT, steps=56),
    "demo-supervised": Case("demo-supervised", SHORT, steps=56),
    "demo-simsiam": Case("demo-simsiam", SHORT, steps=56),
    "demo-simclr": Case("demo-simclr", SHORT, steps=56),
    "demo-byol": Case("demo-byol", SHORT, steps=56),
    "demo-swav": Case("demo-swav", (*SHORT, *SWAV), steps=56),
    "demo-2procs-float32": Case("demo", (*THIRTY, "training.precision=float32"), ("--procs", "2"), steps=30),
    "demo-2procs-bfloat16": Case("demo", THIRTY, ("--procs", "2"), steps=30),
}

FULL = {"demo": Case("demo", steps=2352)}
"""The README's table: 14 epochs x (5400 images // 32 = 168 steps), evaluation whole."""

MORE = {  # --more: settings that no recipe above has
    "kmeans-replace": Case(
        "demo-full", (*THIRTY, "method.vocabulary=kmeans_replace", "method.kmeans_patience=5", "method.head=fixed"), steps=30
    ),
    "kmeans-sinkhorn": Case(
        "demo", (*THIRTY, "method.vocabulary=kmeans_sinkhorn", "method.learn_kappa=true", "method.pooling=mean"), steps=30
    ),
    "hard-whole-cutmix": Case(
        "demo",
        (
            *THIRTY,
            "method.codes=hard",
            "method.queue_vector=local",
            "method.teacher_momentum_schedule=constant",
            "views.crop_extent=whole",
            "views.cutmix_probability=0.8",
            "optimizer.cosine_per=epoch",
        ),
        steps=30,
    ),
    "monitor-online-torch-loader": Case(
        "demo-full",
        (
            *THIRTY,
            "training.monitor=true",
            "evaluation.every_epochs=1",
            "evaluation.fewshot.sampler=counter",
            "evaluation.linear.schedule=cosine",
            "method.queue_vector=global_average",
            "training.precision=float32",
        ),
        ("--loader", "torch"),
        steps=30,
    ),
    "crops-that-differ-lars": Case(
        "demo-moco",
        (
            *THIRTY,
            "optimizer.name=lars_byol",
            "views.num_small_crops=2",
            "views.small_crop_size=16",
            "views.per_crop=[{blur_probability = 1.0}, {solarise_probability = 0.2}, {}, {}]",
        ),
        steps=30,
    ),
    "simsiam-2procs": Case("demo-simsiam", THIRTY, ("--procs", "2"), steps=30),
    "swav-2procs": Case("demo-swav", (*THIRTY, *SWAV), ("--procs", "2"), steps=30),
    "moco-2procs": Case("demo-moco", THIRTY, ("--procs", "2"), steps=30),
    "bownet-2procs": Case("demo-bownet", THIRTY, ("--procs", "2"), steps=30, runs=3),
}

CASES = {**QUICK, **FULL, **MORE}


class CaseError(Exception):
    """A case did not run as it must; the sentence says why."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------- hashes


def tensor_hash(name: str, tensor: torch.Tensor) -> dict[str, str]:
    """Return the hash of a tensor with its type and shape; `name` is for the complaint only."""
    plain = tensor.detach().cpu().contiguous()
    if plain.is_sparse or plain.is_quantized:
        raise CaseError(f"tensor {name} is neither dense nor plain")
    kind = f"{plain.dtype} {list(plain.shape)}"
    digest = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"kind": kind, "sha256": digest.hexdigest()}


def combined(tensors: dict[str, dict[str, str]]) -> str:
    """Return one hash of named tensors."""
    lines = (f"{name} {found['kind']} {found['sha256']}\n" for name, found in sorted(tensors.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def values_hash(values: Any) -> str:
    """Return the hash of JSON values; floats are compared to the last bit, as repr writes them so."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def encoder_tensors(run: Path) -> dict[str, dict[str, str]]:
    path = run / "encoder.safetensors"
    if not path.is_file():
        raise CaseError(f"{run} has no encoder.safetensors")
    with safe_open(path, framework="pt") as file:
        return {name: tensor_hash(name, file.get_tensor(name)) for name in sorted(file.keys())}


def checkpoint_content(run: Path) -> Any:
    """Load the newest checkpoint."""
    paths = sorted(run.glob("checkpoint*.pt"), key=lambda path: (path.stat().st_mtime_ns, "previous" not in path.name))
    if not paths:
        raise CaseError(f"{run} has no checkpoint*.pt")
    return torch.load(paths[-1], map_location="cpu", weights_only=True)


def walk(value: Any, path: str = "") -> dict[str, dict[str, str]]:
    """Return every tensor below, by its path of keys."""
    if isinstance(value, torch.Tensor):
        return {path: tensor_hash(path, value)}
    found: dict[str, dict[str, str]] = {}
    if isinstance(value, dict):
        for key, below in value.items():
            found |= walk(below, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, below in enumerate(value):
            found |= walk(below, f"{path}/{number}")
    return found


def results_of(run: Path) -> list[Any]:
    """Return what was measured, sorted, without dates."""
    found = []
    for path in run.glob("results/**/*.json"):
        result = json.loads(path.read_bytes())
        numbers = sorted([m["name"], m["value"], m["interval"], m["count"]] for m in result["measurements"])
        found.append([result["protocol"], result["subject"], numbers])
    return sorted(found)


def curves_of(run: Path) -> dict[str, list[Any]]:
    """Return the points of the metric files without the clock."""
    curves = {}
    for name in ("metrics", "online"):
        path = run / f"{name}.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        curves[name] = [timeless(json.loads(line)) for line in lines]
    return curves


def timeless(value: Any) -> Any:
    """Return a point without time stamps, times and checksums."""
    if isinstance(value, dict):
        return {key: timeless(below) for key, below in value.items() if key not in {*TIMING, "time", "t", "crc"}}
    return value


def run_details(run: Path) -> dict[str, Any]:
    """Return the hashes of a finished run, one by one."""
    content = checkpoint_content(run)
    step = content.get("step") if isinstance(content, dict) else None
    return {
        "run": run.name,
        "steps": step,
        "encoder": encoder_tensors(run),
        "checkpoint": walk(content),
        "results": results_of(run),
        "curves": curves_of(run),
    }


def line_of(name: str, found: dict[str, Any]) -> str:
    return (
        f"{name}  steps={found['steps']}  encoder={combined(found['encoder'])}  checkpoint={combined(found['checkpoint'])}  "
        f"results={values_hash(found['results'])}  curves={values_hash(found['curves'])}  run={found['run']}"
    )


def data_line(folder: Path) -> str:
    """Return the hash of a prepared data set's files of images."""
    files = sorted(folder.glob("*.beton"))
    if not files:
        raise CaseError(f"{folder} has no *.beton")
    digests = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return f"data/{folder.name}  beton={hashlib.sha256(chr(10).join(digests).encode()).hexdigest()}"


# ------------------------------------------------------------------------------------------------------------ the commands


class Runner:
    """Calls a checkout's command line."""

    def __init__(self, checkout: Path, out: Path) -> None:
        self.checkout, self.out = checkout, out
        (out / "logs").mkdir(parents=True, exist_ok=True)
        (out / "machine.toml").write_text("")  # nothing of the user's own machine file
        keep = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("OBOWLAB_", "MLFLOW_", "SLURM_", "PYTHON", "OMP_", "MKL_", "NUMBA_"))
        }
        self.environment = {
            **keep,
            "PYTHONPATH": str(checkout),
            "PYTHONDONTWRITEBYTECODE": "1",  # leaves the checkout as it is
            "NUMBA_CACHE_DIR": str(out / "numba"),  # so does this
            "GIT_OPTIONAL_LOCKS": "0",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OBOWLAB_MACHINE": str(out / "machine.toml"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        where = self._ask("import obowlab; print(obowlab.__file__)")
        if not Path(where).is_relative_to(checkout):
            raise CaseError(f"obowlab is imported from {where}, not from {checkout}")
        say(f"obowlab is {where}")
        self.run_options = self.call(["run", "--help"], log="help", quiet=True)

    def _ask(self, code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.checkout, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CaseError(f"obowlab cannot be imported from {self.checkout}: {done.stderr.strip()[-500:]}")
        return done.stdout.strip()

    def call(self, words: list[str], *, log: str, quiet: bool = False) -> str:
        """Run `obowlab WORDS` to its end and return its standard output.

        Raises:
            CaseError: it ended with an error; quotes its last lines.
        """
        command = [sys.executable, "-m", "obowlab.cli", *words]
        if not quiet:
            say(f"  obowlab {' '.join(words)}")
        path = self.out / "logs" / f"{log}.err"
        with path.open("wb") as errors:
            try:
                done = subprocess.run(
                    command,
                    cwd=self.checkout,
                    env=self.environment,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    timeout=TIMEOUT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise CaseError(f"took more than {TIMEOUT_S} s; see {path}") from None
        said = done.stdout.decode(errors="replace")
        path.with_suffix(".out").write_text(said)
        if done.returncode:
            last = "\n    ".join((said + path.read_text(errors="replace")).strip().splitlines()[-12:])
            raise CaseError(
                f"`obowlab {' '.join(words)}` ended with exit code {done.returncode}:\n    {last}\n    (all of it: {path})"
            )
        return said

    def prepare(self) -> None:
        """Prepare the photos."""
        if not PHOTOS.is_file():
            raise CaseError(f"there are no photos {PHOTOS}")
        words = ["data", "prepare", "tinyimagenet100", "--source", str(PHOTOS), "--data-root", str(self.out / "data")]
        self.call(words, log="data-prepare")

    def train(self, name: str, case: Case) -> dict[str, dict[str, Any]]:
        """Train a case in a run store of its own and return the details of its runs by name."""
        root = self.out / "runs" / name
        shutil.rmtree(root, ignore_errors=True)  # a finished run would only be shown again
        words = ["run", case.recipe, *(word for setting in case.settings for word in ("--set", setting))]
        words += [
            "--seed",
            "0",
            "--device",
            "cpu",
            *case.options,
            "--data-root",
            str(self.out / "data"),
            "--runs-root",
            str(root),
        ]
        words += [option for option in ("--no-progress", "--no-quote") if option in self.run_options]
        said = self.call(words, log=name)
        if name == "demo":
            (self.out / "demo-table.txt").write_text(said)
        runs = sorted(path.parent for path in root.glob("*/encoder.safetensors"))
        if len(runs) != case.runs:
            raise CaseError(
                f"left {len(runs)} run folders with an encoder in {root}, not {case.runs}: {[run.name for run in runs]}"
            )
        details = {}
        for run in runs:
            own = re.sub(r"-s\d+-[0-9a-f]{8}$", "", run.name).removeprefix(case.recipe).lstrip("-")
            details[f"{name}/{own}" if own else name] = run_details(run)
        last = details.get(name)
        if last is None:
            raise CaseError(f"left no run of the last stage: {list(details)}")
        if last["steps"] != case.steps:
            raise CaseError(f"took {last['steps']} steps, not {case.steps}")
        if not last["results"]:
            raise CaseError(f"left no results in {root}")
        return dict(sorted(details.items()))


# ------------------------------------------------------------------------------------------------------------------ explain


def explain(old: Path, new: Path) -> int:
    """Print what differs between the details of two OUT_FOLDERs; return 1 if anything does."""
    before, after = (json.loads((folder / "details.json").read_bytes()) for folder in (old, new))
    different = 0
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            print(f"{name}: only in {old if name in before else new}")
            continue
        ours, theirs = before[name], after[name]
        for part in ("encoder", "checkpoint"):
            one, other = ours[part], theirs[part]
            changed = [key for key in one if key in other and one[key] != other[key]]
            gone, come = [key for key in one if key not in other], [key for key in other if key not in one]
            if not changed and not gone and not come:
                continue
            different += 1
            same = sorted(v["kind"] + v["sha256"] for v in one.values()) == sorted(
                v["kind"] + v["sha256"] for v in other.values()
            )
            verdict = "the same tensors under other names" if same else "other tensors"
            print(
                f"{name} {part}: {verdict}; of {len(one)}: {len(changed)} changed {changed[:3]}, gone {gone[:3]}, new {come[:3]}"
            )
        for part in ("results", "curves", "steps", "run"):
            if ours[part] != theirs[part]:
                different += 1
                print(f"{name} {part}: {first_difference(ours[part], theirs[part])}")
    print(f"{different} difference(s) in {len(before.keys() & after.keys())} runs that both have.")
    return int(different > 0)


def first_difference(one: Any, other: Any, path: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                return first_difference(one.get(key), other.get(key), f"{path}/{key}")
    if isinstance(one, list) and isinstance(other, list):
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            if a != b:
                return first_difference(a, b, f"{path}/{number}")
        return f"at {path or '/'}: {len(one)} entries were there, now {len(other)}"
    return f"at {path or '/'}: was {str(one)[:200]}, now {str(other)[:200]}"


class Printed:
    """Prints lines, and compares each with the line of the same name in a file of expected ones."""

    def __init__(self, file: Path | None) -> None:
        lines = [line.split("  ") for line in file.read_text().splitlines()] if file else []
        self.expected = {line[0]: line[1:] for line in lines}
        self.file = file
        self.same = 0
        self.different: list[str] = []

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        name, *columns = line.split("  ")
        if self.file is None:
            return
        if name.startswith("#"):
            if name not in self.expected:
                say(f"WARNING: '{name}' is not in {self.file}: on another CPU or torch bits differ whatever the code")
        elif name not in self.expected:
            self.different.append(name)
            say(f"{name}: NOT IN {self.file}")
        elif columns == self.expected[name]:
            self.same += 1
            say(f"{name}: SAME")
        else:
            self.different.append(name)
            changed = [column.partition("=")[0] for column in columns if column not in self.expected[name]]
            say(f"{name}: DIFFERENT in {', '.join(changed) or 'columns that are gone'}")


# --------------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the checkout (with --explain: an OUT_FOLDER)")
    parser.add_argument("out", type=Path, help="OUT_FOLDER, for this script alone")
    parser.add_argument("--quick", action="store_true", help="leave the whole demo out")
    parser.add_argument("--more", action="store_true", help="also the settings that no recipe has")
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", choices=list(CASES), help=f"of {', '.join(CASES)}; the data sets stay"
    )
    parser.add_argument("--against", type=Path, metavar="FILE", help="printed by an earlier call; say what is as it was there")
    parser.add_argument("--explain", action="store_true", help="compare the details.json of two OUT_FOLDERs")
    given = parser.parse_args()
    checkout, out = given.checkout.resolve(), given.out.resolve()
    if given.explain:
        return explain(checkout, out)
    if not (checkout / "obowlab").is_dir():
        parser.error(f"{checkout} is no checkout of obowlab")
    if out.is_relative_to(checkout):
        parser.error("OUT_FOLDER must lie outside of the checkout")
    if out.is_dir() and any(out.iterdir()) and not (out / ".bits").exists():
        parser.error(f"{out} is not empty and not an OUT_FOLDER of this script")
    out.mkdir(parents=True, exist_ok=True)
    (out / ".bits").touch()
    os.nice(10)
    details: dict[str, Any] = {}
    show = Printed(given.against)
    if given.only:
        chosen = given.only
        if (out / "details.json").is_file():
            details = json.loads((out / "details.json").read_bytes())
    else:
        chosen = [*QUICK, *([] if given.quick else FULL), *(MORE if given.more else [])]
        for folder in ("data", "runs", "logs"):
            shutil.rmtree(out / folder, ignore_errors=True)
    shutil.rmtree(out / "numba", ignore_errors=True)  # numba does not see that a function in another file changed
    show(f"# torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    show(f"# CPU {cpu[1] if cpu else '?'}")
    began = time.monotonic()
    failed = []
    try:
        runner = Runner(checkout, out)
        if any(CASES[name].recipe.startswith("tiny") for name in chosen):
            runner.prepare()
            show(data_line(out / "data" / "tinyimagenet100"))
    except CaseError as error:
        say(f"FAILED before any case: {error}")
        return 1
    for name in chosen:
        started = time.monotonic()
        say(f"{name} ...")
        for old in [key for key in details if key == name or key.startswith(f"{name}/")]:
            del details[old]
        try:
            found = runner.train(name, CASES[name])
        except CaseError as error:
            failed.append(name)
            show(f"{name}  FAILED")
            say(f"{name} FAILED: {error}")
            continue
        except Exception as error:  # a file of another shape than expected
            failed.append(name)
            show(f"{name}  FAILED")
            say(f"{name} FAILED: its files cannot be read: {type(error).__name__}: {error}")
            continue
        details |= found
        (out / "details.json").write_text(json.dumps(details, indent=1))
        for each, hashes in found.items():
            show(line_of(each, hashes))
        say(f"{name}: {time.monotonic() - started:.0f} s")
    if (out / "data" / "synthetic").is_dir():
        show(data_line(out / "data" / "synthetic"))
    say(f"{len(chosen)} cases in {time.monotonic() - began:.0f} s" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    if given.against:
        say(
            f"Against {given.against}: {show.same} lines SAME"
            + (f", DIFFERENT: {', '.join(show.different)}" * bool(show.different))
        )
    return int(bool(failed or show.different))


if __name__ == "__main__":
    sys.exit(main())

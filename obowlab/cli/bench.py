"""`obowlab bench`: measure which part bounds a run on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from obowlab.cli.options import (
    HARDWARE,
    ROOTS,
    MachineOptions,
    dry_run_option,
    json_flag,
    machine_options,
    set_option,
    when_interrupted,
    would,
)
from obowlab.cli.output import print_json, print_table

if TYPE_CHECKING:
    from obowlab.launch.bounds import Facts, Measured


@click.command()
@click.argument("name", metavar="[RECIPE]", default="demo")
@set_option
@click.option("--seconds", type=click.FloatRange(min=1), default=40.0, show_default=True, help="About how long.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads. [default: as a run has]")
@json_flag
@machine_options(*HARDWARE, *ROOTS)
@dry_run_option
def bench(
    name: str,
    overrides: tuple[str, ...],
    seconds: float,
    threads: int | None,
    as_json: bool,
    options: MachineOptions,
    dry_run: bool,
) -> int:
    """Measure what bounds a run on this machine: loader, rendering, step or evaluation.

    Each part of training RECIPE is timed alone, then all of them together, in one process. Nothing is kept. Where the data set
    is not prepared, images are drawn.
    """
    from obowlab.config import load_recipe
    from obowlab.launch.bounds import measure, verdict
    from obowlab.launch.gpu_leases import check_gpus

    load_recipe(name, overrides=overrides)
    machine = options.machine(threads=threads)
    check_gpus(machine)
    if dry_run:
        would(f"measure a run of {name} for about {seconds:g} s; nothing is kept")
        return 0
    when_interrupted("nothing is kept.")
    measured = measure(name, overrides=overrides, machine=machine, seconds=seconds, say=_say)
    assert measured.facts is not None
    bound, sentence = verdict(measured.parts, facts=measured.facts)
    if as_json:
        print_json({"recipe": name, "bound": bound, "sentence": sentence, **_values(measured, measured.facts)})
        return 0
    rows = [[part.name, _number(part.images_per_s), _number(part.ms_per_step), part.note] for part in measured.parts]
    print_table(("part", "images/s", "ms per step", "note"), rows, right=("images/s", "ms per step"))
    click.echo(_peak(measured.facts))
    click.echo(sentence)
    return 0


def _values(measured: Measured, facts: Facts) -> dict[str, Any]:
    return {"parts": [asdict(part) for part in measured.parts], **asdict(facts), "utilisation": facts.utilisation}


def _peak(facts: Facts) -> str:
    """Return how well the step uses the device."""
    if facts.device == "cuda":
        mfu = "" if facts.utilisation is None else f", MFU {facts.utilisation:.0f} % in {facts.precision}"
        return f"The step does {facts.tflops:.1f} TFLOP/s on {facts.card}{mfu}."
    share = f"{facts.utilisation:.0f} % of what a matrix product was timed at"
    return f"The step does {1e3 * facts.tflops:.1f} GFLOP/s on the CPU, {share}."


def _number(value: float | None) -> str:
    from obowlab import text

    return text.ABSENT if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _say(line: str) -> None:
    click.echo(line, err=True)

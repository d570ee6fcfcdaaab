"""Options that several commands share, and the Machine they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from obowlab.config import Machine

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

DEVICES = ("auto", "cpu", "cuda")
LOADERS = ("auto", "ffcv", "torch")

PATH = click.Path(path_type=Path)

dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done and change nothing.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting of the recipe; repeatable."
)
data_root_option = click.option("--data-root", type=PATH, help="Where prepared data sets are. [default: data]")
runs_root_option = click.option("--runs-root", type=PATH, help="Where run folders are. [default: runs]")
machine_option = click.option(
    "--machine", "machine_file", type=PATH, help="Machine file (TOML). [default: ~/.config/obowlab/machine.toml]"
)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


launcher_option = click.option(
    "--launcher", type=click.Choice(("local", "slurm")), help="Here and now, or as jobs of a Slurm cluster. [default: local]"
)
wait_option = click.option("--wait", is_flag=True, help="With --launcher slurm: wait until the jobs are over.")


def roots(command: Decorated) -> Decorated:
    """Add the options that say where things are."""
    for option in (machine_option, runs_root_option, data_root_option):
        command = option(command)
    return command


def hardware(command: Decorated) -> Decorated:
    """Add the options that say with what a command computes."""
    options = (
        click.option("--device", type=click.Choice(DEVICES), help="Device to compute on. [default: auto]"),
        click.option("--workers", type=click.IntRange(min=0), metavar="N", help="Loader workers per process; 0: in the process."),
        click.option("--loader", type=click.Choice(LOADERS), help="Loader backend; the pixels are the same. [default: auto]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def machine_from(*, machine_file: Path | None = None, **overrides: Any) -> Machine:
    """Return the Machine of the machine file, the environment and the given options; None leaves a field alone."""
    from obowlab.config import load_machine

    return load_machine(file=machine_file, overrides=overrides)


def job_words(words: Sequence[str], *, machine: Machine, machine_file: Path | None) -> tuple[str, ...]:
    """Return a command as a job of a cluster has to carry it out: with everything that options said here.

    Args:
        words: the command's own words.
        machine: where and with what.
        machine_file: holds the machine's other settings; None for the usual place.
    """
    from obowlab.config import command_options

    file = ("--machine", str(machine_file.absolute())) if machine_file is not None else ()
    return (*words, *command_options(machine), "--device", machine.device, "--launcher", "local", *file)


def absolute(name: str) -> str:
    """Return a recipe, study or table file by its whole path, and a plain name as it is."""
    return str(Path(name).absolute()) if Path(name).is_file() else name


def would(line: str) -> None:
    """Print one line of a dry run."""
    click.echo(f"Would {line}")

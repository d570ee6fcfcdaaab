"""Options that several commands share, and the Machine they make."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from obowlab.cli import INTERRUPTION
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Machine
    from obowlab.launch.submit import Submitter

Returned = TypeVar("Returned")

DEVICES = ("auto", "cpu", "cuda")
LOADERS = ("auto", "ffcv", "torch")

PATH = click.Path(path_type=Path)

dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done and change nothing.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting of the recipe; repeatable."
)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")

ROOTS = ("data_root", "runs_root", "machine_file")
"""The options that say where things are."""

HARDWARE = ("device", "workers", "loader")
"""The options that say with what a command computes."""

CLUSTER = ("launcher", "wait")
"""The options that say whether it does so here."""

_DECLARED = {
    "launcher": click.option(
        "--launcher", type=click.Choice(("local", "slurm")), help="Here and now, or as jobs of a Slurm cluster. [default: local]"
    ),
    "wait": click.option("--wait", is_flag=True, help="With --launcher slurm: wait until the jobs are over."),
    "device": click.option("--device", type=click.Choice(DEVICES), help="Device to compute on. [default: auto]"),
    "workers": click.option(
        "--workers", type=click.IntRange(min=0), metavar="N", help="Loader workers per process; 0: in the process."
    ),
    "loader": click.option(
        "--loader", type=click.Choice(LOADERS), help="Loader backend; the pixels are the same. [default: auto]"
    ),
    "data_root": click.option("--data-root", type=PATH, help="Where prepared data sets are. [default: data]"),
    "runs_root": click.option("--runs-root", type=PATH, help="Where run folders are. [default: runs]"),
    "machine_file": click.option(
        "--machine", "machine_file", type=PATH, help="Machine file (TOML). [default: ~/.config/obowlab/machine.toml]"
    ),
}


@dataclass(frozen=True)
class MachineOptions:
    """The options of a command that describe the machine; None where one is not given.

    Attributes:
        machine_file: holds the machine's other settings; None for the usual place.
        wait: until the jobs of a cluster are over.
    """

    data_root: Path | None = None
    runs_root: Path | None = None
    machine_file: Path | None = None
    device: str | None = None
    workers: int | None = None
    loader: str | None = None
    launcher: str | None = None
    wait: bool = False

    def machine(self, **overrides: Any) -> Machine:
        """Return the Machine of the machine file, the environment, these options and further values; None leaves a field alone.

        Raises:
            UserError: one of them is not valid, or there is nothing to wait for.
        """
        from obowlab.config import load_machine

        given = {name: value for name, value in vars(self).items() if name not in ("machine_file", "wait")}
        machine = load_machine(file=self.machine_file, overrides=given | overrides)
        if self.wait and machine.launcher != "slurm":
            raise UserError("--wait is for jobs of a cluster (--launcher slurm): here the command waits anyway.")
        return machine


def machine_options(*names: str) -> Callable[[Callable[..., Returned]], Callable[..., Returned]]:
    """Add options of the machine to a command, which takes them as one argument, `options`."""

    def decorate(command: Callable[..., Returned]) -> Callable[..., Returned]:
        @functools.wraps(command)
        def with_options(*args: Any, **given: Any) -> Returned:
            return command(*args, options=MachineOptions(**{name: given.pop(name) for name in names}), **given)

        for name in reversed(names):
            with_options = _DECLARED[name](with_options)
        return with_options

    return decorate


def submitter_of(machine: Machine, *, options: MachineOptions) -> Submitter:
    """Return what submits a command as jobs, which run it with the options of machine and places given here."""
    from obowlab.launch.submit import Submitter

    file = ("--machine", str(options.machine_file.absolute())) if options.machine_file is not None else ()
    return Submitter(
        machine=machine,
        complete=lambda arguments: (*arguments, *machine.local_args(), *file),
        wait=options.wait,
        say=click.echo,
    )


def absolute(name: str) -> str:
    """Return a study, table or weights file by its whole path, and a plain name as it is."""
    return str(Path(name).absolute()) if Path(name).is_file() else name


def absolute_recipe(name: str) -> str:
    """Return a recipe of one's own by its whole path, and a shipped one by its name."""
    from obowlab.config import find_recipe, recipe_files

    return name if name in recipe_files() else str(find_recipe(name).absolute())


def confirm(question: str, *, yes: bool) -> bool:
    """Ask on the terminal before something is taken away; `yes` answers.

    Raises:
        UserError: there is no terminal to ask on.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(f"{question} Add --yes: there is no terminal to ask on.")
    return click.confirm(question, err=True)


def when_interrupted(consequence: str) -> None:
    """Set what the line after a first Ctrl-C says from now on, behind `Interrupted: `."""
    click.get_current_context().meta[INTERRUPTION] = f": {consequence}"


def nearest_of(word: str, known: list[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known word; see `config.nearest`, which is imported late."""
    from obowlab.config import nearest

    return nearest(word, known)


def would(line: str) -> None:
    """Print one line of a dry run."""
    click.echo(f"Would {line}")

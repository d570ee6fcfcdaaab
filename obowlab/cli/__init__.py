"""The command line: parse, call one function, print.

The group below knows every command by name and one line of help; a command's module is imported when the command is asked
for, and whatever is heavy (numpy, pydantic, torch, mlflow) only when it does something. So `--help` answers at once.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click

from obowlab import __version__
from obowlab.errors import UserError, memory_sentence, refusal_of
from obowlab.log import log_to_stderr
from obowlab.signals import on_signals

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("obowlab.cli.run:run", "Pretrain a recipe, then evaluate the encoder; the same command again continues."),
    "tune": ("obowlab.cli.tune:tune", "Search the settings of a recipe with Optuna; the same command again continues."),
    "eval": ("obowlab.cli.eval:evaluate", "Measure the encoder of a run or of a weights file."),
    "embed": ("obowlab.cli.embed:embed", "Write the features of a folder of images as a file of numpy or Parquet."),
    "ablate": ("obowlab.cli.ablate:ablate", "Train what the rows of tables need and lack, then show the tables."),
    "table": ("obowlab.cli.ablate:table", "Show tables of the paper beside what the run store has; trains nothing."),
    "words": ("obowlab.cli.words:words", "Show the visual words of a run: the patches that each of them stands for."),
    "data": ("obowlab.cli.data:data", "Prepare, draw, verify and list data sets."),
    "init": ("obowlab.cli.init:init", "Write a recipe fitted to your images, with the reason for every value."),
    "config": ("obowlab.cli.config:config", "List, show and compare recipes."),
    "runs": ("obowlab.cli.runs:runs", "List, show, compare, tag, delete, sync and export runs."),
    "jobs": ("obowlab.cli.jobs:jobs", "Show what is queued, running and over, where, how far and how long it will take."),
    "weights": ("obowlab.cli.weights:weights", "Inspect, import, continue and export weights."),
    "report": (
        "obowlab.cli.report:report",
        "Write tables, curves, vocabulary health, studies and provenance as a static site.",
    ),
    "bench": (
        "obowlab.cli.bench:bench",
        "Measure what bounds a run on this machine: loader, rendering, step or evaluation.",
    ),
    "doctor": ("obowlab.cli.doctor:doctor", "Check this machine and print the command that fixes what is missing."),
    "ui": ("obowlab.cli.ui:ui", "Browse the runs in MLflow on this machine."),
}
"""Command name -> (where it is, one line of help)."""


UNUSABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EMLINK, errno.EMFILE, errno.ENFILE),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.EBUSY),
)
"""What a disk may refuse anything with that a command reads or writes: full, not ours, gone for a while, too much, no name."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit codes after Ctrl-C, and when the reader of a pipe is gone: 128 + SIGINT and SIGPIPE, as shells have it."""

INTERRUPTION = "obowlab.interruption"
"""Where a command's context has what the line after Ctrl-C says of it."""


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used, and lists commands without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None when there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown name raises a UserError with the nearest known one."""
        if args[0] not in COMMANDS:
            _refuse_command(args[0], known=list(COMMANDS), before="obowlab")
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse, or print the help; a reader that has enough of it ends the command quietly."""
        with _reader_may_leave():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; Ctrl-C is one line at once and exit code 130 (click itself would print an empty line too)."""
        try:
            with _answering_interruptions(ctx), _reader_may_leave():
                return super().invoke(ctx)
        except KeyboardInterrupt as interruption:
            if not interruption.args:
                click.echo(_interruption(ctx), err=True)
            return INTERRUPTED

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from `COMMANDS` alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


class Family(click.Group):
    """A group of a few commands in one module (`data`, `runs`, ...), in the order of their definition."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of their definition."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown name raises a UserError with the nearest known one."""
        if args[0] not in self.commands:
            _refuse_command(args[0], known=list(self.commands), before=f"obowlab {self.name}")
        return super().resolve_command(ctx, args)


@contextmanager
def _answering_interruptions(ctx: click.Context) -> Iterator[None]:
    """Let the first Ctrl-C print, before anything else happens, what `options.when_interrupted` says of the command."""

    def answer(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # of a line of progress
        click.echo(f"{clear}{_interruption(ctx)}", err=True)
        raise KeyboardInterrupt("answered")

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored in the background, or somebody else's
        yield
        return
    with on_signals(answer, (signal.SIGINT,)):
        yield


def _interruption(ctx: click.Context) -> str:
    return f"Interrupted{ctx.meta.get(INTERRUPTION, '.')}"


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End quietly, with the code that a shell gives such programs, when what reads the output has closed the pipe."""
    try:
        yield
    except BrokenPipeError:
        with suppress(OSError):  # what is left in the buffer would complain at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(BROKEN_PIPE) from None


def _refuse_command(name: str, *, known: list[str], before: str) -> None:
    from obowlab.config import nearest

    if name.startswith("-"):
        raise UserError(f"There is no option '{name}' of '{before}'; `{before} --help` lists what there is.")
    raise UserError(f"There is no command '{before} {name}'.{nearest(name, known)}")


def _nearest_option(error: click.NoSuchOption) -> str:
    """Return a hint: the nearest option, or the key of a recipe that is named like it where `--set` sets one."""
    near = error.possibilities or []
    if error.ctx is not None and any("--set" in parameter.opts for parameter in error.ctx.command.params):
        from obowlab.config import METHOD_SECTIONS, Recipe, known_keys

        keys = [*known_keys(Recipe), *(key for section in METHOD_SECTIONS.values() for key in known_keys(section, "method."))]
        keys.sort(key=lambda key: -key.count("."))  # of equal names the outermost, which comes last: epochs of training
        names = {f"--{name}": key for key in keys for name in (key, key.rpartition(".")[2])}
        option = "--" + error.option_name.lstrip("-").replace("-", "_")
        best = difflib.get_close_matches(option, [*near, *names], n=1, cutoff=0.8)
        if best and best[0] not in near:
            return f" Did you mean '--set {names[best[0]]}=...'?"
    return f" Did you mean '{near[0]}'?" if near else ""


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="obowlab", message="%(prog)s %(version)s")
def cli() -> None:
    """Self-supervised learning by predicting online bags of visual words (OBoW).

    Begin with `obowlab doctor`, then `obowlab run demo`.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 a mistake of the user, 130 interrupted."""
    log_to_stderr()
    try:
        result: Any = cli.main(args=None if argv is None else list(argv), prog_name="obowlab", standalone_mode=False)
    except UserError as error:
        return _complain(str(error))
    except click.NoSuchOption as error:
        where = error.ctx.command_path if error.ctx is not None else "obowlab"
        return _complain(f"There is no option '{error.option_name}' of '{where}'.{_nearest_option(error)}")
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        return _complain(f"{error.format_message()}{_nearest_choice(error)}")
    except OSError as error:
        if error.errno in NO_LOCKS:
            return _complain(f"The disk has no file locks ({error.strerror}): choose another --runs-root and --data-root.")
        if error.errno in UNUSABLE:
            return _complain(refusal_of(error))
        return _complain(_memory(error))
    except (MemoryError, RuntimeError, SystemError) as error:
        return _complain(_memory(error))
    except click.Abort:  # Ctrl-C before the command began
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _nearest_choice(error: click.ClickException) -> str:
    """Return which choice of an option was probably meant; nothing where none is near."""
    kind = error.param.type if isinstance(error, click.BadParameter) and error.param is not None else None
    typed = re.match(r"'(.*)' is not one of", error.message)
    if not isinstance(kind, click.Choice) or typed is None:
        return ""
    close = difflib.get_close_matches(typed[1], [str(choice) for choice in kind.choices], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def _memory(error: Exception) -> str:
    """Return the sentence for memory that ran out; raise anything else."""
    message = memory_sentence(error)
    if message is None:
        raise error
    return message


def _complain(message: str) -> int:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    return 2

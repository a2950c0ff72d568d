"""Where a command line ends: whatever went wrong is one sentence on standard error and a status.

Bad input has exit status 2, a person's Ctrl-C 130, what cannot be done with good input 1 or the
status that its exception names; a traceback is a mistake of the program. SIGTERM, and a terminal
that closes, are taken as Ctrl-C.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable
from typing import cast

import typer

from space.errors import ConfigError, Interrupted, MnasError
from space.signals import interruptible

#: The class of all complaints about flags and arguments, whichever click typer is built on.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _cannot(error: Exception) -> str:
    return f"cannot read or write: {error}."


def _line(sentence: str, status: int) -> str:
    return f"mnas: {sentence}"


def exit_status(
    command: Callable[[], object],
    help_command: str,
    *,
    line: Callable[[str, int], str] = _line,
    explain: Callable[[Exception], str] = _cannot,
) -> int:
    """Run a command and return its exit status; what it raises becomes a line and a status.

    Args:
        command: A typer application that lets exceptions through (`standalone_mode=False`); what
            it returns is the status if it is a whole number.
        help_command: Whom a wrong flag is referred to.
        line: What is printed for a sentence and its status.
        explain: The sentence for a file or a database that cannot be read or written.

    Raises:
        Exception: Any that is neither bad input nor the machine's doing.
    """
    try:
        with interruptible():
            status = command()
        # typer answers Ctrl-C with this status itself.
        if status == Interrupted.exit_status:
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except MnasError as error:
        sentence, status = str(error), error.exit_status
    except _UsageError as error:
        message, status = cast(typer.BadParameter, error).format_message(), ConfigError.exit_status
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message, file=sys.stderr)
            return status
        sentence = f"{message.rstrip('.')}. See `{help_command}`."
    except (KeyboardInterrupt, typer.Abort):
        sentence, status = "stopped.", Interrupted.exit_status
    except BrokenPipeError:
        # The reader of a pipe went away: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MnasError.exit_status
    except (sqlite3.OperationalError, OSError) as error:
        sentence, status = explain(error), MnasError.exit_status
    print(line(sentence, status), file=sys.stderr)
    return status

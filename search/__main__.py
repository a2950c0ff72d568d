"""The command line's border: `python -m search` and the console script `mnas`.

Bad input ends in one sentence on standard error and exit status 2, never in a traceback; what
cannot be done with good input, in one and exit status 1.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from typing import cast

import typer

from search.cli import app
from space.errors import ConfigError, Interrupted, MnasError
from space.files import is_full

#: The class of all complaints about flags and arguments, whichever click typer is built on.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run a command and exit with its status."""
    sys.exit(_run())


def _run() -> int:
    try:
        status = app(standalone_mode=False)
        return status if isinstance(status, int) else 0
    except MnasError as error:
        return _complain(str(error), error.exit_status)
    except _UsageError as error:
        message = cast(typer.BadParameter, error).format_message()
        return _complain(f"{message.rstrip('.')}. See `mnas --help`.", ConfigError.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped.", Interrupted.exit_status)
    except BrokenPipeError:
        # The reader of a pipe went away: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MnasError.exit_status
    except (sqlite3.OperationalError, OSError) as error:
        if isinstance(error, OSError) and not is_full(error):
            return _complain(f"cannot read or write: {error}.", MnasError.exit_status)
        remedy = "end the program that holds it" if "locked" in str(error) else "make room"
        return _complain(
            f"cannot write: {error}; what was committed is safe, so {remedy} and go on with"
            " `mnas resume`.",
            MnasError.exit_status,
        )


def _complain(sentence: str, status: int) -> int:
    print(f"mnas: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

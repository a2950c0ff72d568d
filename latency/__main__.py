"""`python -m latency COMMAND`: latency without the rest of the engine.

Every error ends in one sentence on standard error: bad input with exit status 2, a device without
a figure with 1.
"""

from __future__ import annotations

import sys
from typing import cast

import typer

from latency.cli import make_app
from space.errors import ConfigError, Interrupted, MnasError

#: The class of all complaints about flags and arguments, whichever click typer is built on.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run a command and exit with its status."""
    from space.mnasnet import find_architecture

    sys.exit(_run(make_app(find_architecture)))


def _run(app: typer.Typer) -> int:
    try:
        status = app(standalone_mode=False)
        return status if isinstance(status, int) else 0
    except MnasError as error:
        return _complain(str(error), error.exit_status)
    except _UsageError as error:
        message = cast(typer.BadParameter, error).format_message()
        sentence = f"{message.rstrip('.')}. See `python -m latency --help`."
        return _complain(sentence, ConfigError.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped.", Interrupted.exit_status)
    except OSError as error:
        return _complain(f"cannot read or write: {error}.", MnasError.exit_status)


def _complain(sentence: str, status: int) -> int:
    print(f"mnas: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

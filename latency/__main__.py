"""`python -m latency COMMAND`: latency without the rest of the engine.

Bad input ends in one sentence on standard error and exit status 2; a device without a figure in
status 1.
"""

from __future__ import annotations

import sys
from typing import cast

import typer

from latency.cli import make_app
from space.errors import MnasError

#: The class of all complaints about flags and arguments, whichever click typer is built on.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def main() -> None:
    """Run a command and exit with its status."""
    from space.mnasnet import find_architecture

    sys.exit(_run(make_app(find_architecture)))


def _run(app: typer.Typer) -> int:
    try:
        status = app(standalone_mode=False)
        return status if isinstance(status, int) else 0
    except MnasError as error:
        return _complain(str(error), EXIT_BAD_INPUT)
    except _UsageError as error:
        message = cast(typer.BadParameter, error).format_message()
        return _complain(f"{message.rstrip('.')}. See `python -m latency --help`.", EXIT_BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped.", EXIT_INTERRUPTED)


def _complain(sentence: str, status: int) -> int:
    print(f"mnas: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

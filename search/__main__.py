"""The command line's border: `python -m search` and the console script `mnas`."""

from __future__ import annotations

import sys

from search.cli import app
from space.command_line import exit_status
from space.files import is_full


def main() -> None:
    """Run a command and exit with its status."""
    sys.exit(exit_status(lambda: app(standalone_mode=False), "mnas --help", explain=_explain))


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and not is_full(error):
        return f"cannot read or write: {error}."
    remedy = "end the program that holds it" if "locked" in str(error) else "make room"
    return (
        f"cannot write: {error}; what was committed is safe, so {remedy} and go on with"
        " `mnas resume`."
    )


if __name__ == "__main__":
    main()

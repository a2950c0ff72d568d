"""`python -m latency COMMAND`: latency without the rest of the engine.

Every error ends in one sentence on standard error: bad input with exit status 2, a device without
a figure with 1.
"""

from __future__ import annotations

import sys

from latency.cli import make_app
from space.command_line import exit_status


def main() -> None:
    """Run a command and exit with its status."""
    from space.mnasnet import find_architecture

    app = make_app(find_architecture)
    sys.exit(exit_status(lambda: app(standalone_mode=False), "python -m latency --help"))


if __name__ == "__main__":
    main()

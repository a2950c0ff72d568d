"""What ends a program from outside, told to it as Ctrl-C is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a terminal that closes, raise KeyboardInterrupt as Ctrl-C does.

    Unless somebody handles or ignores them (`nohup`), or this is not the main thread. Afterwards
    all is as before, Ctrl-C included: MindSpore takes that for itself with its first computation,
    for good, and answers it with SIGTERM, by which a notebook would end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # not Python's own: it cannot be put back
                signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt

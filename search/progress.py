"""Progress for people: a live display on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.trial import Trial


def format_duration(seconds: float) -> str:
    """Return `42 s`, `3 min 20 s` or `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Watches a campaign: trials done, best so far, time left. Use it as a context manager.

    Args:
        console: Where to show it.
        total: Trials of the whole campaign.
        done: Trials that were done before this process.
        best: The best trial so far.
    """

    def __init__(self, console: Console, total: int, done: int, best: Trial | None) -> None:
        self._console = console
        self._total = total
        self._done = done
        self._done_at_start = done
        self._best = best
        self._started = time.monotonic()
        self._phase = ""
        self._step = 0
        self._steps = 0
        self._entropy: float | None = None
        self._last_line = ""
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._display, console=self._console, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str, total: int) -> None:
        """A phase of `total` steps begins."""
        self._phase, self._step, self._steps = name, 0, total

    def advance(self) -> None:
        """One step of the phase is done."""
        self._step += 1

    def trial(self, trial: Trial) -> None:
        """A trial has its result."""
        self._done += 1
        if trial.reward is not None and (
            self._best is None or trial.reward > (self._best.reward or 0.0)
        ):
            self._best = trial
        if self._live is None:
            self._console.print(self._plain(trial), highlight=False, markup=False, soft_wrap=True)

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        """The controller has learned from a batch."""
        self._entropy = diagnostics.get("entropy")

    def line(self, text: str) -> None:
        """A training printed a line."""
        self._last_line = text
        if self._live is None:
            self._console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A sentence that a reader should not miss."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> str:
        here = self._done - self._done_at_start
        if here <= 0:
            return "time left unknown"
        each = (time.monotonic() - self._started) / here
        return f"{format_duration(each * max(0, self._total - self._done))} left"

    def _plain(self, trial: Trial) -> str:
        parts = [f"[{self._done}/{self._total}] trial {trial.id}: {trial.outcome}"]
        if trial.reward is not None and trial.accuracy is not None:
            parts.append(
                f"reward {trial.reward:.4f}, accuracy {trial.accuracy:.4f},"
                f" {trial.latency_ms or 0.0:.3f} ms"
            )
        if trial.reused_from is not None:
            parts.append(f"result of trial {trial.reused_from}")
        elif trial.failure is not None:
            parts.append(trial.failure.reason)
        parts.append(self._left())
        return ", ".join(parts)

    def _display(self) -> Group:
        bar = ProgressBar(total=max(1, self._total), completed=self._done, width=40)
        head = Table.grid(padding=(0, 1))
        head.add_row(bar, f"{self._done}/{self._total} trials", self._left())
        rows = [head]
        facts = Table.grid(padding=(0, 2))
        if self._best is not None:
            facts.add_row(
                Text("best", style="bold"),
                f"reward {self._best.reward or 0.0:.4f}",
                f"accuracy {self._best.accuracy or 0.0:.4f}",
                f"{self._best.latency_ms or 0.0:.3f} ms",
                f"trial {self._best.id}",
            )
        now = f"{self._phase} {self._step}/{self._steps}" if self._steps else self._phase
        entropy = "" if self._entropy is None else f"entropy {self._entropy:.3f}"
        facts.add_row(Text("now", style="bold"), now, entropy, "", "")
        rows.append(facts)
        if self._last_line:
            return Group(*rows, Text(self._last_line, style="dim", overflow="ellipsis"))
        return Group(*rows)

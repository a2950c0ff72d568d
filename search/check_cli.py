"""The command `mnas check`: what a campaign will do, lack and take, before it is run.

Heavy imports stand inside the command, so that `mnas --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from space.errors import ConfigError

EXIT_LACKS = 1


def register(app: typer.Typer, free_folder: Callable[[Path], Path]) -> None:
    """Add the command; `free_folder` is where `mnas search` writes without --out."""

    @app.command("check")
    def check_command(
        config: Annotated[str, typer.Argument(metavar="CONFIG", help="A file or a shipped name.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="[KEY=VALUE]...", help="Settings to replace."),
        ] = None,
        out: Annotated[
            Path | None, typer.Option("--out", help="The campaign's folder [runs/<name>].")
        ] = None,
        plan_only: Annotated[
            bool, typer.Option("--plan", help="Try no networks; estimate from what is stated.")
        ] = False,
        steps: Annotated[
            int, typer.Option(min=2, help="Optimizer steps of each network tried.")
        ] = 8,
        repeats: Annotated[
            int, typer.Option(min=0, help="Train one network fully with so many seeds.")
        ] = 0,
        seconds_per_child: Annotated[
            float | None,
            typer.Option(
                "--seconds_per_child", "--seconds-per-child", min=0, help="Then none is trained."
            ),
        ] = None,
        seconds_per_measurement: Annotated[
            float | None,
            typer.Option(
                "--seconds_per_measurement",
                "--seconds-per-measurement",
                min=0,
                help="Then nothing is measured.",
            ),
        ] = None,
        price: Annotated[float | None, typer.Option(min=0, help="Of a worker hour.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    ) -> None:
        """Say what a campaign will do, lack and take, before it is run.

        The exit status is 1 if something is lacking here.
        """
        from rich.console import Console

        from search.check import look, plan
        from search.check_networks import CheckOptions, check
        from search.check_text import finding_lines, plan_lines, show, show_lines
        from search.config import load_campaign_config
        from search.warm_start import check_warm_start
        from space.records import to_plain

        if repeats == 1:
            raise ConfigError("--repeats: must be 0, or 2 and more seeds, but got 1.")
        options = CheckOptions(
            plan_only, steps, repeats, seconds_per_child, seconds_per_measurement, price
        )
        wanted = load_campaign_config(config, overrides or [])
        check_warm_start(wanted)
        folder = free_folder(Path("runs") / wanted.name) if out is None else out
        findings = look(wanted, folder)
        planned = plan(wanted, folder, findings)
        console = Console(stderr=as_json)
        show_lines(console, [*plan_lines(planned), *finding_lines(findings)])
        with console.status("trying networks"):
            report = check(wanted, planned, findings, options)
        if as_json:
            print(json.dumps(to_plain(report), allow_nan=False))
        else:
            show(console, report)
        if any(finding.state == "lacks" for finding in report.findings):
            raise typer.Exit(EXIT_LACKS)

"""The command `mnas check`: what a campaign will do, lack and take, before it is run.

Heavy imports stand inside the command, so that `mnas --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from space.errors import ConfigError

if TYPE_CHECKING:
    from search.config import CampaignConfig

EXIT_LACKS, EXIT_INTERRUPTED = 1, 130


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
            Path | None,
            typer.Option(
                "--out",
                help="The campaign's folder [runs/<name>]; with --rank, the file of its trainings"
                " [runs/<name>-rank.json].",
            ),
        ] = None,
        plan_only: Annotated[
            bool, typer.Option("--plan", help="Try no networks; estimate from what is stated.")
        ] = False,
        steps: Annotated[
            int, typer.Option(min=2, help="Optimizer steps of each network tried.")
        ] = 8,
        repeats: Annotated[
            int | None,
            typer.Option(
                min=0,
                help="Train one network fully with so many seeds [3, if that takes no longer than"
                " ten minutes; with --rank 0].",
            ),
        ] = None,
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
        number: Annotated[
            int | None,
            typer.Option(
                "--rank",
                help="Instead, train so many networks as children and in full, 4 at least: does"
                " the proxy rank them as the full training does? Takes hours, and goes on where"
                " it stopped.",
            ),
        ] = None,
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
        if number is not None:
            if options != CheckOptions(steps=steps, repeats=repeats):
                raise ConfigError(
                    "--rank: goes with --steps and --repeats, but not with --plan, --price or"
                    " seconds that are stated; leave them out."
                )
            _rank(wanted, number, out, steps, repeats or 0, as_json=as_json)
            return
        check_warm_start(wanted)
        folder = free_folder(Path("runs") / wanted.name) if out is None else out
        findings = look(wanted, folder)
        planned = plan(wanted, folder, findings)
        console = Console(stderr=as_json)
        show_lines(console, [*plan_lines(planned, wanted), *finding_lines(findings)])
        with console.status("trying networks"):
            report = check(wanted, planned, findings, options)
        if as_json:
            print(json.dumps(to_plain(report), allow_nan=False))
        else:
            show(console, report)
        if any(finding.state == "lacks" for finding in report.findings):
            raise typer.Exit(EXIT_LACKS)


def _rank(
    config: CampaignConfig,
    number: int,
    out: Path | None,
    steps: int,
    repeats: int,
    *,
    as_json: bool,
) -> None:
    """Train networks both ways, as far as they are not in the file, and say how they rank."""
    from rich.console import Console

    from search.check_rank import open_ranking
    from search.check_text import rank_lines, rank_table, show_lines
    from space.records import to_plain

    path = Path("runs") / f"{config.name}-rank.json" if out is None else out
    console = Console(stderr=as_json)
    with open_ranking(config, number, path, repeats=repeats) as ranking:
        try:
            _train_all(console, ranking, steps)
        except KeyboardInterrupt:
            console.print(
                f"\nStopped. What has been trained is in {path}; the same command goes on.",
                soft_wrap=True,
            )
            raise typer.Exit(EXIT_INTERRUPTED) from None
        report = ranking.report()
    if as_json:
        print(json.dumps(to_plain(report), allow_nan=False))
    else:
        console.print(rank_table(report))
        show_lines(console, rank_lines(config, report))
    if report.tau is None:
        raise typer.Exit(EXIT_LACKS)


def _train_all(console: Any, ranking: Any, steps: int) -> None:
    """Train what is left, with a line before and after each and the time left."""
    from search.check_text import ranking_lines, show_lines, task_text, training_text

    with console.status("trying a few steps, to know how long it takes") as status:
        ranking.try_out(steps)
        show_lines(console, ranking_lines(ranking))
        while left := ranking.left():
            status.update(task_text(ranking, left[0]))
            training = ranking.train(left[0])
            line = training_text(ranking, left[0], training)
            console.print(line, highlight=False, markup=False, soft_wrap=True)

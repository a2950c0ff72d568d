"""The command line's campaign commands: search, resume, status, top, trials,
compare, report.

Heavy imports stand inside the commands, so that `mnas --help` answers at once. Commands that
report take `--json`: one object on one line on standard output, keys as field names with units.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search import check_cli, cli_parts
from space.errors import ConfigError, Interrupted
from space.files import versions

if TYPE_CHECKING:
    from search.campaign import Campaign
    from search.config import CampaignConfig
    from search.engine import CampaignOutcome, CampaignWatcher

app = typer.Typer(
    name="mnas",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
#: `mnas status --watch` looks so often.
WATCH_INTERVAL_S = 2.0

Json = Annotated[bool, typer.Option("--json", help="One JSON object on one line.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to replace.")
]
TensorBoardFlag = Annotated[
    bool, typer.Option("--tensorboard", help="Write curves into DIR/tensorboard.")
]
MlflowOption = Annotated[
    str | None, typer.Option("--mlflow", metavar="URI", help="Log to an MLflow server or store.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A campaign's folder.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        found = versions()
        print(f"mnas {found.pop('mnas', 'not installed')}")
        for name, version in found.items():
            print(f"{name} {version}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Say which versions are installed.", callback=_say_version,
            is_eager=True,
        ),
    ] = False,
) -> None:  # fmt: skip
    """Find a network for your device: search, measure, retrain, export."""


def print_json(value: Any) -> None:
    """Print one JSON object on one line."""
    print(json.dumps(value, allow_nan=False))


@app.command("search")
def search_command(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A file or a shipped name.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The campaign's folder [runs/<name>].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the one in --out.")] = False,
    tensorboard: TensorBoardFlag = False,
    mlflow: MlflowOption = None,
    as_json: Json = False,
) -> None:
    """Run a search campaign from a configuration."""
    from search.config import load_campaign_config

    wanted = load_campaign_config(config, overrides or [])
    if resume:
        if out is None:
            raise ConfigError("--resume: needs --out DIR, the campaign to go on with.")
        from search.campaign import continue_with

        _run(out, wanted, continue_with, tensorboard=tensorboard, mlflow=mlflow, as_json=as_json)
        return
    from search.campaign import create
    from search.warm_start import check_warm_start

    check_warm_start(wanted)
    folder = _free_folder(Path("runs") / wanted.name) if out is None else out
    _run(folder, wanted, create, tensorboard=tensorboard, mlflow=mlflow, as_json=as_json)


@app.command("resume")
def resume_command(
    folder: Folder,
    overrides: Overrides = None,
    tensorboard: TensorBoardFlag = False,
    mlflow: MlflowOption = None,
    as_json: Json = False,
) -> None:
    """Go on with a campaign where it stopped; a raised stop.trials extends a finished one."""
    from search.campaign import continue_with, resumed_config

    wanted = resumed_config(folder, overrides or [])
    _run(folder, wanted, continue_with, tensorboard=tensorboard, mlflow=mlflow, as_json=as_json)


def _free_folder(folder: Path) -> Path:
    """`folder`, or `folder-2`, `folder-3`, ... if it is taken."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _run(
    folder: Path,
    config: CampaignConfig,
    opener: Callable[[Path, CampaignConfig], Campaign],
    *,
    tensorboard: bool,
    mlflow: str | None,
    as_json: bool,
) -> None:
    """Run a campaign that `opener` creates or opens, with progress for people."""
    from rich.console import Console

    from search.engine import run
    from search.launch_text import describe
    from search.parts import Parts
    from search.progress import Progress

    console = Console(stderr=as_json)
    parts = Parts(config)
    client = None
    if mlflow is not None:
        from search.tracking import connect

        client = connect(mlflow)
    with opener(folder, config) as campaign:
        _print_lines(console, [*describe(parts), ("folder", str(folder))])
        store = campaign.store
        best = store.best(1)
        pending = store.counts().get("pending", 0)
        done = sum(store.counts().values()) - pending
        progress = Progress(console, campaign.config.stop.trials, done, best[0] if best else None)
        try:
            with ExitStack() as stack:
                watcher: CampaignWatcher = stack.enter_context(progress)
                if tensorboard:
                    from search.check import num_workers
                    from search.tensorboard import TensorBoard

                    workers = num_workers(campaign.config)
                    watcher = TensorBoard(watcher, folder / "tensorboard", workers)
                    stack.enter_context(closing(watcher))
                if client is not None:
                    from search.tracking import MlflowTracking

                    tracking = MlflowTracking(watcher, client, folder, campaign.config)
                    watcher = stack.enter_context(tracking)
                outcome = run(campaign, parts, watcher)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; nothing is lost, go on with: mnas resume {folder}"
            ) from None
    _print_outcome(console, outcome, as_json=as_json)


def _print_outcome(console: Any, outcome: CampaignOutcome, *, as_json: bool) -> None:
    from search.tables import trial_summary, winner_text

    if as_json:
        best = trial_summary(outcome.best) if outcome.best else None
        print_json(
            {
                "folder": outcome.folder,
                "stop_reason": outcome.stop_reason,
                "trials": outcome.trials,
                "completed": outcome.completed,
                "target_ms": outcome.target_ms,
                "best": best,
                "winner": outcome.winner,
                "report": outcome.report,
            }
        )
        return
    lines = [("ended", outcome.stop_reason), ("target", f"{outcome.target_ms:.4g} ms")]
    if outcome.best is not None:
        best_trial = outcome.best
        lines.append(
            (
                "best",
                f"trial {best_trial.id}: reward {best_trial.reward:.4f}, accuracy"
                f" {best_trial.accuracy:.4f}, {best_trial.latency_ms:.3f} ms",
            )
        )
    if outcome.winner is not None:
        winner = outcome.winner
        lines += [
            ("retrained", winner_text(winner)),
            ("weights", f"{outcome.folder}/{winner['weights']}"),
            ("onnx", f"{outcome.folder}/{winner['onnx']}"),
        ]
        if "onnx_int8" in winner:
            lines.append(("onnx int8", f"{outcome.folder}/{winner['onnx_int8']}"))
    lines += [
        ("report", outcome.report),
        ("database", f"{outcome.folder}/campaign.db"),
        ("see also", f"mnas top {outcome.folder}"),
    ]
    _print_lines(console, lines)


def _print_lines(console: Any, lines: list[tuple[str, str]]) -> None:
    for label, text in lines:
        console.print(f"{label:<11}{text}", highlight=False, markup=False, soft_wrap=True)


@app.command("status")
def status_command(
    folder: Folder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every two seconds while it runs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say how a campaign stands, also while it runs."""
    from rich.console import Console

    from search.tables import campaign_lines

    if watch and not as_json:
        _watch(folder)
        return
    summary = _summary(folder)
    if as_json:
        print_json(summary)
    else:
        _print_lines(Console(), campaign_lines(summary))


def _summary(folder: Path) -> dict[str, Any]:
    """How a campaign stands. The database is open for a moment only: its log stays short."""
    from search.campaign import open_to_read, read_config
    from search.tables import campaign_summary

    with closing(open_to_read(folder)) as store:
        return campaign_summary(folder, store, read_config(folder))


def _watch(folder: Path) -> None:
    """Show how a running campaign stands until it stops."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from search.tables import campaign_lines

    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            summary = _summary(folder)
            lines = [f"{label:<11}{text}" for label, text in campaign_lines(summary)]
            live.update(Text("\n".join(lines)), refresh=True)
            if summary["state"] != "running":
                return
            time.sleep(WATCH_INTERVAL_S)


@app.command("compare")
def compare_command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Campaigns' folders.")],
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw curves and fronts: FILE.html, FILE.png or FILE.svg."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show campaigns of one objective side by side: figures, fronts, and pairs by seed."""
    from rich.console import Console

    from latency.plots import check_picture
    from search.compare import compare, compare_tables, pair_tables
    from search.compare_plot import ENDINGS, write_plot

    check_picture(plot, ENDINGS)
    found = compare(folders)
    if plot is not None:
        write_plot(found, plot)
    if as_json:
        print_json({**found.plain(), "plot": None if plot is None else str(plot)})
        return
    console = Console()
    for table in compare_tables(found, console.width):
        console.print(table)
    _print_lines(console, [(f"{n}", row["folder"]) for n, row in enumerate(found.campaigns, 1)])
    for pairs in pair_tables(found):
        console.print(pairs.table)
    for sentence in (*found.notes, *([found.not_paired] if found.not_paired else ())):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    if plot is not None:
        _print_lines(console, [("plot", str(plot))])


@app.command("top")
def top_command(
    folder: Folder,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many.")] = 10,
    front: Annotated[
        bool,
        typer.Option("--front", help="The Pareto front instead, in the controller's objectives."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the best networks of a campaign."""
    from rich.console import Console

    from search.campaign import open_to_read, read_config
    from search.environment import Environments
    from search.measuring import in_int8
    from search.pareto import front_objectives, pareto_front
    from search.tables import trial_summary, trial_table

    objectives = front_objectives(read_config(folder))
    with closing(open_to_read(folder)) as store:
        if front:
            superseded = store.superseded()
            each = (trial for trial in store.trials() if trial.id not in superseded)
            chosen = pareto_front(each, objectives)
        else:
            chosen = store.best(count)
        note = ", latency in int8, accuracy in float32" if in_int8(store, chosen) else ""
        environments = Environments(store)
        numbers = [environments.of(trial) for trial in chosen]
    if as_json:
        rows = [
            trial_summary(trial) | {"environment": number}
            for trial, number in zip(chosen, numbers, strict=True)
        ]
        print_json({"folder": str(folder), "trials": rows})
    else:
        title = "Pareto front" if front else f"best {len(chosen)} networks"
        console = Console()
        title = f"{title} of {folder}{note}"
        columns = objectives if front else ()
        changes = environments.notes()
        console.print(trial_table(chosen, title, columns, numbers if changes else ()))
        _print_lines(console, [("changed", note) for note in changes])
        _print_lines(console, [(f"trial {trial.id}", trial.architecture) for trial in chosen])


@app.command("trials")
def trials_command(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="FILE.csv or FILE.parquet.")],
    as_json: Json = False,
) -> None:
    """Write all trials of a campaign as a table for other tools."""
    from search.campaign import open_to_read
    from search.trial_export import export_trials

    with closing(open_to_read(folder)) as store:
        written = export_trials(store, out)
    if as_json:
        print_json({"file": str(out), "trials": written})
    else:
        print(f"trials     {written:,} in {out}")


@app.command("report")
def report_command(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file [DIR/report.html].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the campaign's report: one HTML file that works offline."""
    from search.campaign import open_to_read, read_config
    from search.report import write_report

    path = out or folder / "report.html"
    with closing(open_to_read(folder)) as store:
        write_report(store, read_config(folder), path)
    if as_json:
        print_json({"report": str(path)})
    else:
        print(f"report     {path}")


check_cli.register(app, _free_folder)
cli_parts.register(app)

"""The command line's commands for single rooms: space, latency, retrain, and plug-ins' checks."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latency import cli as latency_cli
from retrain import __main__ as room
from retrain.convert_cli import convert
from retrain.data_cli import app as data_app
from space.errors import ConfigError, MnasError

if TYPE_CHECKING:
    from retrain.config import Recipe
    from search.config import CampaignConfig

Json = Annotated[bool, typer.Option("--json", help="One JSON object on one line.")]
Arch = Annotated[
    str, typer.Argument(metavar="ARCH", help="A published name, a text form, or DIR:TRIAL.")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    space = typer.Typer(help="Look at networks and search spaces.", no_args_is_help=True)
    space.command("show")(space_show)
    space.command("sample")(space_sample)
    space.command("check")(space_check)
    app.add_typer(space, name="space", rich_help_panel=None)
    app.add_typer(latency_cli.make_app(find_network), name="latency", rich_help_panel=None)
    app.command("retrain")(retrain)
    app.command("finetune")(room.finetune)
    app.command("validate")(room.validate)
    app.add_typer(data_app, name="data", rich_help_panel=None)
    app.command("export")(export)
    app.command("convert")(convert)
    app.command("check-plugin")(check_plugin)


def find_network(name: str) -> Any:
    """Return the Architecture given by a published name, a text form, or DIR:TRIAL.

    Raises:
        ConfigError: None of these.
    """
    from space.mnasnet import find_architecture

    folder, colon, number = name.rpartition(":")
    if colon and "|" not in name:
        return campaign_trial(Path(folder), number).network()
    return find_architecture(name)


def campaign_trial(folder: Path, number: str) -> Any:
    """Return a campaign's trial by its number as text.

    Raises:
        ConfigError: No campaign there, or it has no such trial.
    """
    from search.campaign import open_to_read

    with closing(open_to_read(folder)) as store:
        trial = store.trial(int(number)) if number.lstrip("-").isdecimal() else None
        proposed = sum(store.counts().values())
    if trial is None:
        known = f"they count from 0 to {proposed - 1}" if proposed else "it has none yet"
        raise ConfigError(f"{folder}: has no trial {number!r}; {known}.")
    return trial


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on one line."""
    print(json.dumps(value, allow_nan=False))


# ---------------------------------------------------------------------------- space


def space_show(
    arch: Arch,
    width: Annotated[float, typer.Option(help="Multiplier of stem and blocks.")] = 1.0,
    resolution: Annotated[int | None, typer.Option(help="Input pixels.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
    as_json: Json = False,
) -> None:
    """Print a network's stages with shapes, parameters and multiply-adds."""
    from space.cost import count, stage_table
    from space.mnasnet import adapt

    network = adapt(find_network(arch), width=width, resolution=resolution)
    cost, stages = count(network), stage_table(network)
    if svg is not None:
        from space.drawing import architecture_svg

        svg.write_text(architecture_svg(network), encoding="utf-8")
    if as_json:
        print_json(
            {
                "architecture": network.text,
                "architecture_hash": network.hash,
                **dataclasses.asdict(cost),
                "stages": [dataclasses.asdict(stage) for stage in stages],
            }
        )
        return
    from rich.console import Console

    from search.tables import plain_table

    table = plain_table(
        f"{arch}  ({network.hash})",
        ["output", "parameters", "multiply-adds"],
        ["stage"],
        ["block"],
    )
    table.add_row("input", _shape(stages[0].input_shape), "", "", "")
    for stage in stages:
        table.add_row(
            stage.name,
            _shape(stage.output_shape),
            f"{stage.parameters:,}",
            f"{stage.macs:,}",
            stage.text,
        )
    console = Console()
    console.print(table)
    _print_lines(
        console,
        [
            ("parameters", f"{cost.parameters:,} trainable"),
            ("with batch-norm statistics", f"{cost.parameters_with_statistics:,}"),
            ("multiply-adds", f"{cost.macs:,}"),
            ("text", network.text),
        ],
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)


def _print_lines(console: Any, lines: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in lines) + 2
    for label, text in lines:
        console.print(f"{label:<{width}}{text}", highlight=False, markup=False, soft_wrap=True)


def space_sample(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="A file or a shipped name.")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Draw networks uniformly over a space's tokens."""
    import numpy as np

    from space.search_space import load_space

    loaded = load_space(space)
    rng = np.random.default_rng(seed)
    drawn = [loaded.sample(rng) for _ in range(count)]
    if as_json:
        print_json(
            {
                "space": loaded.name,
                "samples": [
                    {"tokens": list(tokens), "architecture": loaded.decode(tokens).text}
                    for tokens in drawn
                ],
            }
        )
        return
    for tokens in drawn:
        print(loaded.decode(tokens).text)


def space_check(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="A file or a shipped name.")],
    arch: Annotated[
        str | None, typer.Argument(metavar="[ARCH]", help="Is this network a member?")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a space's file, count it exactly, and say whether a network is a member."""
    from space.search_space import load_space

    loaded = load_space(space)
    member, why = None, None
    if arch is not None:
        try:
            loaded.encode(find_network(arch))
            member = True
        except ConfigError:
            raise
        except ValueError as error:
            member, why = False, str(error)
    if as_json:
        print_json(
            {
                "space": loaded.name,
                "decisions": [dataclasses.asdict(d) for d in loaded.decisions],
                "size": loaded.size,
                "distinct_size": loaded.distinct_size,
                "member": member,
                "why_not": why,
            }
        )
    else:
        from rich.console import Console

        lines = [
            ("space", loaded.name),
            ("decisions", f"{len(loaded.decisions)}"),
            ("token vectors", f"{loaded.size:,}"),
            ("different networks", f"{loaded.distinct_size:,}"),
        ]
        if arch is not None:
            lines.append((arch[:40], "is a member" if member else f"is no member: {why}"))
        _print_lines(Console(), lines)
    if member is False:
        raise typer.Exit(1)


# ---------------------------------------------------------------------------- plug-ins


def check_plugin(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="controller, evaluator or device.")],
    class_path: Annotated[str, typer.Argument(metavar="CLASS", help="package.module:Name.")],
    options: Annotated[str, typer.Option(help="The class's options, as YAML.")] = "{}",
    space: Annotated[str, typer.Option(help="A space to try it on.")] = "small_image",
    as_json: Json = False,
) -> None:
    """Check a class of your own against the engine's contract."""
    from search.plugins import check
    from space.records import parse_yaml

    values = parse_yaml(options, where="--options")
    if not isinstance(values, dict):
        raise ConfigError(f"--options: must be a mapping in YAML, but got {options!r}.")
    results = check(kind, class_path, values, space)
    if as_json:
        print_json({"class": class_path, "checks": [dataclasses.asdict(r) for r in results]})
    else:
        for result in results:
            mark = "ok    " if result.passed else "FAILED"
            print(f"{mark}  {result.name}" + (f": {result.message}" if result.message else ""))
    if not all(result.passed for result in results):
        raise typer.Exit(1)


# ---------------------------------------------------------------------------- retrain


def retrain(
    overrides: room.Overrides = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="A recipe: a file or a shipped name.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(help="A published name, a text form, or DIR:TRIAL [the recipe's]."),
    ] = None,
    data_dir: room.DataDir = None,
    out: room.Out = None,
    resolution: room.Resolution = None,
    seed: room.Seed = 0,
    threads: room.Threads = None,
    resume: room.Resume = False,
    campaign: Annotated[
        Path | None, typer.Option(help="Hand over this campaign's best networks instead.")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="How many of them.")] = None,
    as_json: Json = False,
    ckpt_path: room.StartPath = None,
    workers: room.NumWorkers = None,
    distribute: room.Distribute = None,
    scale_lr: room.ScaleLr = False,
    tensorboard: room.Tensorboard = False,
) -> None:
    """Train a network fully with a recipe, or a campaign's best networks with the campaign's.

    With --campaign, --config names the recipe if the campaign has none; --data_dir, --threads and
    --workers say where its data are and how it is to be trained here.
    """
    if campaign is not None:
        others = {
            "arch": arch, "out": out, "resolution": resolution, "seed": seed or None,
            "resume": resume or None, "ckpt_path": ckpt_path, "distribute": distribute,
            "scale_lr": scale_lr or None, "tensorboard": tensorboard or None,
        }  # fmt: skip
        if given := [f"--{name}" for name, value in others.items() if value is not None]:
            raise ConfigError(f"--campaign: goes without {', '.join(given)}; leave them out.")
        changed = _with_recipe(
            campaign, config, tuple(overrides or ()), data_dir, threads, workers
        )
        _hand_over(campaign, changed, top, as_json=as_json)
        return
    if top is not None:
        raise ConfigError("--top: goes with --campaign DIR only; give that, too.")
    if config is None:
        raise ConfigError("retrain: needs --config, or --campaign DIR.")
    text = find_network(arch).text if arch is not None and ":" in arch else arch
    room.train(
        config, text, overrides, data_dir, out, resolution, seed, threads, resume, as_json,
        ckpt_path, workers, distribute, scale_lr, tensorboard,
    )  # fmt: skip


def _with_recipe(
    folder: Path,
    recipe: str | None,
    overrides: tuple[str, ...],
    data_dir: str | None,
    threads: int | None,
    workers: int | None,
) -> CampaignConfig:
    """A campaign's configuration with what a command says of its full trainings.

    Raises:
        ConfigError: There is no recipe, or what is said does not fit it.
    """
    from retrain.config import load_recipe
    from search.campaign import read_config
    from search.config import RetrainConfig

    config = read_config(folder)
    section = config.retrain
    if overrides and recipe is None:
        raise ConfigError(
            f"{overrides[0]}: goes with --config, for a campaign without a recipe; leave it out."
        )
    try:
        if recipe is not None:
            loaded = load_recipe(recipe, overrides, data_dir=data_dir)
            section = (
                RetrainConfig(loaded)
                if section is None
                else dataclasses.replace(section, recipe=loaded)
            )
        elif section is not None and data_dir is not None:
            data = dataclasses.replace(section.recipe.data, path=data_dir)
            changed = dataclasses.replace(section.recipe, data=data)
            section = dataclasses.replace(section, recipe=changed)
        if section is not None:
            given = {"threads": threads, "workers": workers}
            said: dict[str, Any] = {name: n for name, n in given.items() if n is not None}
            section = dataclasses.replace(section, **said)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{folder}: retrain: {error}.") from None
    if recipe is not None and section is not None:
        _check_classes(folder, config, section.recipe)
    return dataclasses.replace(config, retrain=section)


def _check_classes(folder: Path, config: CampaignConfig, recipe: Recipe) -> None:
    """Raise unless a recipe's data have the classes of a campaign's networks.

    Raises:
        ConfigError: They have not.
    """
    from retrain.data import class_names
    from search.parts import campaign_space

    classes = campaign_space(config).config.classes
    found = len(class_names(recipe.data))
    if found != classes:
        raise ConfigError(
            f"--config: its data must have the {classes} classes of the networks of {folder}, but"
            f" have {found}; name another recipe."
        )


def _hand_over(folder: Path, config: CampaignConfig, top: int | None, *, as_json: bool) -> None:
    from rich.console import Console

    from search.campaign import continue_with
    from search.campaign_log import campaign_logs
    from search.environment import note_environment
    from search.finalists import hand_over
    from search.parts import Parts
    from search.progress import Progress
    from search.report import write_report

    with (
        continue_with(folder, config) as campaign,
        Progress(Console(stderr=True), 0, 0, None) as progress,
        campaign_logs(folder, progress.note),
    ):
        parts = Parts(campaign.config)
        note_environment(campaign.store, parts.meters, progress.note)
        winner = hand_over(campaign, parts, progress, top=top)
        write_report(campaign.store, campaign.config, folder / "report.html")
    if winner is None:
        raise MnasError(f"{folder}: no network was retrained; campaign.log says why.")
    if as_json:
        print_json(winner)
    else:
        _print_lines(Console(), [(key, str(value)) for key, value in winner.items()])


def export(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A campaign's folder.")
    ] = None,
    trial: Annotated[
        int | None, typer.Option("--trial", help="Of which trial [the winner].")
    ] = None,
    ckpt_path: Annotated[
        Path | None,
        typer.Option("--ckpt_path", "--ckpt-path", help="Weights, in place of DIR."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file.")] = None,
    format: Annotated[
        str, typer.Option("--format", help="onnx, mindir, or python: a module that stands alone.")
    ] = "onnx",
    config: room.RecipeOption = None,
    data_dir: room.DataDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    threads: room.Threads = None,
    as_json: Json = False,
    int8: room.Int8 = False,
    calibration_images: room.CalibrationImages = None,
    max_drop: room.MaxDrop = None,
) -> None:
    """Write a trained network as ONNX, MindIR or Python, checked numerically against MindSpore."""
    from retrain.commands import export_suffix

    suffix = ("_int8" if int8 else "") + export_suffix(format)
    if folder is None and ckpt_path is not None:
        weights, target = ckpt_path, out or ckpt_path.with_name(f"model{suffix}")
    elif folder is not None and ckpt_path is None:
        number = _winner(folder) if trial is None else trial
        weights = _trained_weights(folder, number)
        target = out or folder / "export" / f"trial_{number}{suffix}"
    else:
        raise ConfigError("export: needs a campaign's DIR or --ckpt_path, one of them.")
    room.export(
        weights, target, format, config, data_dir, overwrite, threads, as_json, int8,
        calibration_images, max_drop,
    )  # fmt: skip


def _winner(folder: Path) -> int:
    from search.campaign import open_to_read

    with closing(open_to_read(folder)) as store:
        winner = store.meta("winner")
    if winner is None:
        raise ConfigError(f"{folder}: has no winner yet; give --trial.")
    return int(winner["trial"])


def _trained_weights(folder: Path, trial: int) -> Path:
    campaign_trial(folder, str(trial))
    from search.finalists import weights_of

    trained = folder / "finalists" / f"trial_{trial}"
    if not (trained / "result.json").exists():
        raise ConfigError(
            f"{folder}: trial {trial} has no trained weights; train its network with"
            f" `mnas retrain --config RECIPE --arch {folder}:{trial} --out {trained}`."
        )
    return weights_of(trained)

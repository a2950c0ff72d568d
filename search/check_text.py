"""What `mnas check` says to people: lines and tables of its records."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from latency.checks import Finding
from search.check import Estimate, Plan
from search.check_networks import LATER, Member, Noise, Report
from search.check_rank import MIN_NETWORKS, Ranking, RankReport, Task, Training
from search.config import CampaignConfig, TrainEvaluatorConfig
from search.launch_text import launch_lines
from search.progress import format_duration
from search.tables import plain_table
from space.cost import count

UNKNOWN = "not known"


def show_lines(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    """Print (label, text) lines."""
    for label, text in lines:
        console.print(f"{label:<11}{text}", highlight=False, markup=False, soft_wrap=True)


def show(console: Console, report: Report) -> None:
    """Print what was tried and what follows from it; the plan stands above already."""
    if report.networks:
        console.print(member_table(report.networks))
    failed = [("FAILED", f"{m.role}: {m.failure}") for m in report.networks if m.failure]
    noise = [] if report.noise is None else [noise_line(report.noise)]
    later = [finding for finding in report.findings if finding.name in LATER]
    show_lines(console, [*failed, *finding_lines(later), *noise, *estimate_lines(report.estimate)])


def plan_lines(plan: Plan, config: CampaignConfig) -> list[tuple[str, str]]:
    """Return (label, text) lines of a plan and its configuration."""
    epochs = "" if plan.epochs is None else f", {plan.epochs:g} epochs"
    free, database, finalists = (
        size / 2**20 for size in (plan.free_bytes, plan.database_bytes, plan.finalists_bytes)
    )
    kept = f", finalists at most {finalists:,.0f} MiB" if plan.finalists_bytes else ""
    return [
        ("space", f"{plan.space}: 10^{plan.size_log10:.1f} token vectors"),
        ("decisions", f"{plan.decisions}"),
        ("controller", plan.controller),
        ("evaluator", f"{plan.evaluator}{epochs}"),
        *launch_lines(config),
        ("objective", f"{plan.objective}, target {plan.target}"),
        (
            "folder",
            f"{plan.folder}: {free / 2**10:.1f} GiB free, campaign.db about {database:.1f} MiB"
            + kept,
        ),
    ]


def finding_lines(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Return (state, what was found) lines."""
    return [(finding.state.upper(), f"{finding.name}: {finding.text}") for finding in findings]


def member_table(members: Sequence[Member]) -> Table:
    """Return the networks tried as a table."""
    figures = ["M params", "M mult-adds", "step s", "child s", "latency ms", "memory MB"]
    said = any("evaluator" in (member.latencies_ms or {}) for member in members)
    note = "; latency is the evaluator's word, not measured" if said else ""
    table = plain_table(f"networks tried{note}", figures, ["network"])
    for member in members:
        table.add_row(
            member.role,
            f"{member.parameters / 1e6:.2f}",
            f"{member.macs / 1e6:,.1f}",
            _figure(member.step_s, ".3g"),
            _figure(member.child_s, ".3g"),
            " / ".join(f"{ms:.3f}" for ms in (member.latencies_ms or {}).values()) or "-",
            _figure(member.peak_memory_mb, ",.0f"),
        )
    return table


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def noise_line(noise: Noise) -> tuple[str, str]:
    """Return the (label, text) line of the proxy's noise."""
    seeds, networks = (
        UNKNOWN if sd is None else f"{sd:.4f}" for sd in (noise.seed_sd, noise.network_sd)
    )
    return (
        "noise",
        f"accuracy's standard deviation: {seeds} over {len(noise.accuracies)} seeds of one"
        f" network, {networks} between the random networks",
    )


def estimate_lines(estimate: Estimate) -> list[tuple[str, str]]:
    """Return (label, text) lines of an estimate; each figure says whence it is known."""
    lines = [
        ("a child", _seconds(estimate.seconds_per_child, estimate.seconds_per_child_source)),
        ("children", f"at most {estimate.children:,}: {_hours(estimate.child_hours)}"),
    ]
    if estimate.measurements:
        each = _seconds(estimate.seconds_per_measurement, estimate.seconds_per_measurement_source)
        total = _hours(estimate.measuring_hours)
        lines += [
            ("latency", each),
            ("measuring", f"at most {estimate.measurements:,} measurements: {total}"),
        ]
    workers = "workers: state executor.workers" if estimate.workers is None else (
        f"workers: {estimate.workers}"
    )  # fmt: skip
    lines += [
        ("search", f"{_hours(estimate.search_hours)} with {workers}"),
        (
            "retrain",
            f"{_hours(estimate.retrain_hours)} on one worker, at a child's time per epoch",
        ),
    ]
    if estimate.accelerator_hours:
        lines.append(("NPUs", f"{estimate.accelerator_hours:,.0f} accelerator hours"))
    if estimate.price is None:
        lines.append(("money", f"{UNKNOWN}: --price P, of a worker hour, gives it"))
    else:
        money = UNKNOWN if estimate.money is None else f"{estimate.money:,.2f}"
        lines.append(("money", f"{money}, at {estimate.price:g} a worker hour (stated)"))
    return lines


def _seconds(value: float | None, source: str | None) -> str:
    if value is None:
        return f"{UNKNOWN}: neither measured nor stated"
    of = ": the random networks' mean, one at a time, here" if source == "measured" else ""
    return f"{value:,.4g} s ({source}{of})"


def _hours(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return format_duration(3600 * value) if value < 10 else f"{value:,.0f} h"


# ---------------------------------------------------------------------------- rank


def ranking_lines(ranking: Ranking) -> list[tuple[str, str]]:
    """Return (label, text) lines of what a ranking is about to do."""
    left = len(ranking.left())
    return [
        (
            "ranking",
            f"{len(ranking.networks)} networks, each trained as a child and in full, one after"
            " another on this machine",
        ),
        ("trainings", f"{ranking.all}, of which {left} are left"),
        ("time", time_left(ranking)),
        ("kept in", f"{ranking.path}; the same command goes on from there"),
    ]


def time_left(ranking: Ranking) -> str:
    """Return how long the trainings that are left take, in words."""
    seconds = ranking.seconds_left()
    if seconds is None:
        return "time left is known after the first trainings"
    return f"about {format_duration(seconds)} left"


def task_text(ranking: Ranking, task: Task) -> str:
    """Return the line of a training that goes on."""
    number = ranking.all - len(ranking.left()) + 1
    return f"training {number}/{ranking.all}, {_what(task)}, {time_left(ranking)}"


def training_text(ranking: Ranking, task: Task, training: Training) -> str:
    """Return the line of a training that has ended."""
    ended = ranking.all - len(ranking.left())
    outcome = f"accuracy {_figure(training.accuracy, '.4f')}"
    if training.failure is not None:
        outcome = f"FAILED: {training.failure}"
    took = format_duration(training.seconds)
    return f"[{ended}/{ranking.all}] {_what(task)}: {outcome}, {took}; {time_left(ranking)}"


def _what(task: Task) -> str:
    how = {"proxy": "as a child", "full": "in full"}[task.kind]
    return f"{count(task.architecture).macs / 1e6:,.2f} M multiply-adds {how}"


def rank_table(report: RankReport) -> Table:
    """Return the networks with both accuracies as a table."""
    figures = ["M mult-adds", "proxy", "full", "proxy s", "full s"]
    table = plain_table("accuracy as a child (proxy) and in full", figures, ["network"])
    for row in report.networks:
        table.add_row(
            _shortened(row.architecture),
            f"{row.macs / 1e6:,.2f}",
            _figure(row.proxy_accuracy, ".4f"),
            _figure(row.full_accuracy, ".4f"),
            _figure(row.proxy_s, ",.0f"),
            _figure(row.full_s, ",.0f"),
        )
    return table


def _shortened(text: str, letters: int = 28) -> str:
    return text if len(text) <= letters else f"{text[: letters - 3]}..."


def rank_lines(config: CampaignConfig, report: RankReport) -> list[tuple[str, str]]:
    """Return (label, text) lines of how well the proxy ranks, and what to do about it."""
    lines = [
        ("FAILED", f"{row.macs / 1e6:,.2f} M multiply-adds {row.failure}; left out of tau")
        for row in report.networks
        if row.failure
    ]
    if report.tau is None:
        why = "one of the accuracies is the same for all networks"
        if report.ranked < MIN_NETWORKS:
            why = f"{report.ranked} networks have both accuracies, but {MIN_NETWORKS} are needed"
        return [*lines, ("tau", f"not defined: {why}")]
    lines.append(
        (
            "tau",
            f"{report.tau:.2f} (Kendall's tau-b; 95 % interval {_figure(report.tau_low, '.2f')} to"
            f" {_figure(report.tau_high, '.2f')}, bootstrap over {report.ranked} networks)",
        )
    )
    if report.tau_macs is not None:
        lines.append(("multiply-adds", f"alone give tau {report.tau_macs:.2f}"))
    lines.append(("noise", noise_of_tau(report)))
    lines.append(("range", "networks nearer to each other than these, as a search's late ones,"
                  " are ranked less well"))  # fmt: skip
    return [*lines, *_advice(config, report, report.tau)]


def noise_of_tau(report: RankReport) -> str:
    """Return the sentence on how much of what tau lacks may be noise."""
    if report.tau_noise is None:
        return "not known: the evaluator does not tell the number of its held-out images"
    seeds = "; --repeats 3 adds that of the proxy's seeds"
    if report.seed_sd is not None:
        number = len(report.seed_accuracies)
        seeds = f" and the proxy's seeds (standard deviation {report.seed_sd:.4f}, {number} seeds)"
    return (
        f"a proxy in the full trainings' exact order would show tau {report.tau_noise:.2f}: the"
        f" rest to 1 may be the noise of finite held-out images{seeds}; that of the full"
        " trainings' seeds is not in it"
    )


def _advice(config: CampaignConfig, report: RankReport, tau: float) -> list[tuple[str, str]]:
    """The warning under a good tau, or the doubt where the interval reaches under it."""
    noisy = report.tau_noise is not None and report.tau_noise < report.good_tau
    if tau < report.good_tau and noisy:
        return [
            (
                "WARNING",
                f"tau {tau:.2f} is below {report.good_tau:g}, but a faultless proxy's would be,"
                " too: the accuracies lie nearer to each other than their held-out images can"
                " tell; before judging the proxy, hold out more with"
                " retrain.recipe.data.validation_images and"
                " evaluator.recipe.data.validation_images, or take harder images, and rank again"
                " with another --out",
            )
        ]
    if tau < report.good_tau:
        remedy = "evaluator.options to more epochs or more images"
        if isinstance(config.evaluator, TrainEvaluatorConfig):
            remedy = (
                "evaluator.recipe.epochs or evaluator.recipe.data.train_images, or lower the noise"
                " with evaluator.recipe.data.validation_images or evaluator.recipe.ema_decay"
            )
        return [
            (
                "WARNING",
                f"tau {tau:.2f} is below {report.good_tau:g}, so that the search mistakes worse"
                f" networks for better ones: raise {remedy}, and rank again with another --out",
            )
        ]
    if report.tau_low is not None and report.tau_low < report.good_tau:
        more = 2 * len(report.networks)
        return [
            (
                "UNSURE",
                f"the interval reaches below {report.good_tau:g}; --rank {more} goes on from these"
                " networks and narrows it",
            )
        ]
    return []

"""What `mnas check` says to people: lines and tables of its records."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from latency.checks import Finding
from search.check import Estimate, Plan
from search.check_networks import LATER, Member, Noise, Report
from search.progress import format_duration
from search.tables import plain_table

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


def plan_lines(plan: Plan) -> list[tuple[str, str]]:
    """Return (label, text) lines of a plan."""
    epochs = "" if plan.epochs is None else f", {plan.epochs:g} epochs"
    workers = "as many as there is room for" if plan.workers is None else plan.workers
    each = "all CPUs" if plan.cpus is None else f"{plan.cpus} CPUs"
    npus = f" and {plan.npus} NPU" if plan.npus else ""
    database, free = plan.database_bytes / 2**20, plan.free_bytes / 2**30
    return [
        ("space", f"{plan.space}: 10^{plan.size_log10:.1f} token vectors"),
        ("decisions", f"{plan.decisions}"),
        ("controller", plan.controller),
        ("evaluator", f"{plan.evaluator}{epochs}"),
        ("workers", f"{workers}, each {each}{npus}"),
        ("devices", ", ".join(plan.devices) or "none: the evaluator gives the latency"),
        ("trials", f"{plan.trials:,}, {plan.mode}, in batches of {plan.batch_size}"),
        ("objective", f"{plan.objective}, target {plan.target}"),
        ("folder", f"{plan.folder}: {free:.1f} GiB free, campaign.db about {database:.1f} MiB"),
    ]


def finding_lines(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Return (state, what was found) lines."""
    return [(finding.state.upper(), f"{finding.name}: {finding.text}") for finding in findings]


def member_table(members: Sequence[Member]) -> Table:
    """Return the networks tried as a table."""
    figures = ["M params", "M macs", "step s", "child s", "latency ms", "memory MB"]
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
    if estimate.price is not None:
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

"""What `learner.plan --gpus N` prints: phases, split, staleness, links, cost."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from cluster.program.console import make_console
from cluster.ray_session.object_store import format_bytes
from learner.capacity.scale.iteration import DEPENDENCY, LOOP, Prediction
from learner.capacity.scale.split import OWN, PAIRED, SHARED, Plan, Site
from learner.config import RunConfig

SIZES = (1, 8, 64, 256, 1024)
"""GPUs of the table of costs."""
WORTH = 1.02  # gain of another update of staleness that is worth naming
WORKERS = "workers"
MARKS = {OWN: "", PAIRED: "*", SHARED: "**"}
Row = tuple[int, Plan | None]


def show_plan(plan: Plan, site: Site, basis: str) -> None:
    """Print phases, loads and what bounds the iteration.

    Args:
        basis: where seconds are from, for the title.
    """
    times, setting, found = plan.times, plan.setting, plan.prediction
    most = -(-setting.groups // setting.samplers)
    table = Table(title=f"an iteration of {plan.images:,} images on {site.card.name}: {basis}")
    for heading in ("phase", "of each"):
        table.add_column(heading)
    for heading in ("s", "share of the iteration"):
        table.add_column(heading, justify="right")
    scored = [
        ("score", pool, -(-setting.groups // setting.servers(pool)) * seconds)
        for pool, seconds in times.score.items()
    ]
    phases = [
        ("sample", "sampler", most * times.sample),
        ("images", "sampler", most * times.images),
        *scored,
        ("messages of groups", "driver", setting.groups * times.driver),
        ("moments", "moments-server", times.commit),
        ("learn", "learner", times.learn),
        ("publish", "learner", times.publish),
        ("weights over the link", "link", setting.seconds("weights")),
        ("load", "sampler", times.load),
        ("record", "driver", times.record),
    ]
    for name, role, seconds in phases:
        table.add_row(name, role, f"{seconds:.3f}", f"{seconds / found.seconds:.0%}")
    make_console().print(table)
    print(
        f"Sampling and scoring take {found.sampling:.2f} s, learning until samplers have the new "
        f"weights {found.learning:.2f}. An iteration {found.seconds:.2f} s, "
        f"{plan.rate:.0f} images/s, {plan.rate / plan.split.gpus:.1f} a GPU ({basis})"
    )
    print(f"Bottleneck: {bottleneck_text(plan)}")


def show_here(found: Prediction, config: RunConfig, measured: str) -> None:
    """Print what is predicted of a run on this machine, from the times of another run."""
    images = config.groups_per_iteration * config.rollouts_per_group
    print(
        f"On this machine an iteration {found.seconds:.2f} s, {images / found.seconds:.0f} "
        f"images/s: sampling and scoring {found.sampling:.2f}, learning {found.learning:.2f}; "
        f"bottleneck: {found.bottleneck} (predicted from what was measured in {measured})"
    )


def bottleneck_text(plan: Plan) -> str:
    """What bounds an iteration, in words."""
    found, ahead = plan.prediction, plan.setting.staleness
    if found.bottleneck == DEPENDENCY:
        return (
            f"sampling waits for weights, and learning for samples ({ahead + 1} iterations share "
            f"{found.sampling + found.learning:.2f} s)"
        )
    if found.bottleneck == LOOP:
        return "the main loop, which waits for moments and learner in turn, and records"
    busy = found.loads.get(found.bottleneck, plan.times.learn) / found.seconds
    return f"{found.bottleneck} ({busy:.0%} of the iteration)"


def show_split(plan: Plan, site: Site, gpus: int) -> None:
    """Print the workers, and how many GPUs are in use."""
    split = plan.split
    servers = ", ".join(f"{count} of {pool}" for pool, count in split.servers.items())
    print(
        f"Best split of {gpus} GPU{'s' * (gpus > 1)} at max_staleness {plan.setting.staleness}: "
        f"{split.samplers} samplers, {servers or 'no reward servers on GPUs'}, {split.learners} "
        f"learner{'s' * (split.learners > 1)}; {split.layout}"
    )
    nodes = len(plan.setting.hosts)
    print(f"On {nodes} node{'s' * (nodes > 1)} of {site.gpus_per_node} GPUs")
    if split.gpus < gpus:
        print(
            f"{gpus - split.gpus} GPUs are left over: with them no split is 2 % faster, at "
            f"{plan.setting.groups} groups an iteration (--groups-per-iteration)"
        )


def show_staleness(plans: Sequence[tuple[int, Plan | None]]) -> None:
    """Print the best split at each staleness."""
    table = Table(title="staleness: how many updates old rollouts are when they are learned from")
    for heading in ("max_staleness", "iteration s", "images/s", WORKERS):
        table.add_column(heading, justify="right")
    for ahead, plan in plans:
        if plan is not None:
            row = f"{plan.seconds:.2f}", f"{plan.rate:.0f}", counts(plan)
            table.add_row(str(ahead), *row)
    make_console().print(table)
    print(needed_staleness([plan for _, plan in plans if plan is not None]))


def needed_staleness(plans: Sequence[Plan]) -> str:
    """The least staleness of the highest rate, and what it means."""
    fastest = max(plan.rate for plan in plans)
    needed = next(plan for plan in plans if plan.rate * WORTH >= fastest)
    ahead = needed.setting.staleness
    if not ahead:
        return "Staleness needed: 0; more gains nothing"
    return (
        f"Staleness needed for {needed.rate:.0f} images/s: {ahead}; on-policy (0) gives "
        f"{plans[0].rate:.0f}. With more than 0 rollouts are from older weights, which changes "
        "what is learned: compare at equal reward, not at equal images (--loss.importance-cap)"
    )


def counts(plan: Plan) -> str:
    """Workers of a plan: samplers/reward servers/learners, with a mark for their layout."""
    split = plan.split
    servers = "+".join(map(str, split.servers.values())) or "CPU"
    return f"{split.samplers}/{servers}/{split.learners}{MARKS[split.layout]}"


def show_links(plan: Plan, site: Site) -> None:
    """Print the bytes of an iteration over links and in object stores."""
    link = site.link
    table = Table(title=f"bytes of an iteration over links of {link * 8 / 1e9:.4g} Gbit/s")
    table.add_column("what")
    for heading in ("busiest link", "seconds there", "all links"):
        table.add_column(heading, justify="right")
    for name, found in plan.setting.traffic.items():
        seconds = found.busiest / link
        size, total = format_bytes(found.busiest), format_bytes(found.total)
        table.add_row(name, size, f"{seconds:.3f}", total)
    make_console().print(table)
    print(
        f"Object store of a node: {format_bytes(plan.store())} at most (images of groups in "
        "flight, three versions of the weights; rollouts on the driver's node)"
    )


def show_costs(rows: Sequence[Row], price: float, scaling: str) -> None:
    """Print a row for each number of GPUs.

    Args:
        price: of one GPU for an hour; 0: none is given.
    """
    what = "groups an iteration fixed" if scaling == "strong" else "groups an iteration grow"
    table = Table(title=f"cost by number of GPUs: {scaling} scaling, {what}")
    headings = ["GPUs", "in use", WORKERS, "s", "images/s", "a GPU", "effi- ciency", "GPU-h"]
    for heading in [*headings, *(["price"] if price else [])]:
        table.add_column(heading, justify="right")
    table.add_column("bottleneck")
    first = next((plan for _, plan in rows if plan is not None), None)
    for gpus, plan in rows:
        if plan is None or first is None:
            table.add_row(str(gpus), *["-"] * (len(headings) - 1 + bool(price)), "does not fit")
            continue
        used, each = plan.split.gpus, plan.rate / plan.split.gpus
        hours = used * plan.seconds * 1000 / 3600
        table.add_row(
            str(gpus),
            str(used),
            counts(plan),
            f"{plan.seconds:.2f}",
            f"{plan.rate:.0f}",
            f"{each:.1f}",
            f"{each / (first.rate / first.split.gpus):.0%}",
            f"{hours:.1f}",
            *([f"{hours * price:,.0f}"] if price else []),
            plan.prediction.bottleneck,
        )
    make_console().print(table)
    print(
        f"Workers are samplers/reward servers/learners; * {PAIRED}; ** {SHARED}. Efficiency: "
        "images/s of a GPU in use, against the first row. GPU-hours"
        f"{' and price' if price else ''} of 1,000 iterations, of the GPUs in use, without start "
        "and evaluations."
    )

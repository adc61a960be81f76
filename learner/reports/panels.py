"""Which curves the report draws: metrics by topic, with units and what to look for.

To draw a metric, add it to `PANELS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from learner.reports.charts import Chart, Level, Line, has_values
from learner.reports.reading import RunData, plain_number
from learner.reports.summary import by_space, space_name
from learner.runs.records import STEP, TUNED
from rewards.config import is_loo_fid
from rewards.metrics.figures import split_figure


@dataclass(frozen=True)
class Panel:
    """Metrics in one chart."""

    topic: str
    title: str
    unit: str
    lines: Mapping[str, str]
    """Name of a line -> metric."""
    note: str
    missing: str = ""
    """What would make it appear."""


FID = "fid/"
REWARDS = "Rewards"
DISTRIBUTION = "Distribution: FID"
POLICY = "Policy"
LEARNING = "Learning"
DIVERSITY = "Diversity and collapse"
SPEED = "Throughput"
TOPICS = {
    REWARDS: "What the policy is tuned for: raw scores before normalisation, the mean of an "
    "iteration's images and the band from their 5th to their 95th percentile.",
    DISTRIBUTION: "How far all images together are from the reference.",
    POLICY: "How the policy moves: away from the base policy, and between sampling and learning.",
    LEARNING: "The optimizer.",
    DIVERSITY: "Rewards of single images can be raised by drawing few images again and again.",
    SPEED: "Where the time goes.",
}
"""Topic -> what it is about; in the order of the page."""

PANELS = (
    Panel(DISTRIBUTION, "FID in the reward's features", "lower is better",
          {"batch": "fid/batch", "moving average": "fid/ema"},
          "Of each iteration's images, and of the moving average that the LOO-FID reward uses."),
    Panel(DISTRIBUTION, "Share of images with a positive LOO-FID reward", "share",
          {"positive": "fid/positive_share"},
          "An image is rewarded if FID with it is lower than without it."),
    Panel(POLICY, "Token entropy", "nats a token",
          {"policy": "policy/entropy", "base policy": "policy/base_entropy"},
          "Falls as the policy becomes certain; a fall without end is collapse."),
    Panel(POLICY, "Entropy coefficient", "in the loss", {"coefficient": "policy/entropy_coef"},
          "Set by the entropy controller; 0 without one (--entropy.controller)."),
    Panel(POLICY, "KL to the base policy", "nats a token", {"KL": "policy/reference_kl"},
          "Distance from the base policy.",
          "it is measured with --loss.kl-coef above 0"),
    Panel(POLICY, "Mismatch KL", "nats a token", {"KL": "policy/mismatch_kl"},
          "Between the policy that sampled and the learner's: near 0 on-policy; growth means that "
          "sampler and learner compute different numbers, or that rollouts are stale."),
    Panel(POLICY, "Clip share", "share of tokens", {"clipped": "policy/clip_fraction"},
          "Tokens whose ratio is outside the clip range; 0 with a single update an iteration, "
          "on-policy."),
    Panel(POLICY, "Staleness", "updates",
          {"rollouts": "policy/staleness", "moments": "moments/staleness"},
          "Age of rollouts and of the moments when they are learned from (--max-staleness)."),
    Panel(LEARNING, "Gradient norm", "before clipping", {"norm": "loss/grad_norm"},
          "Spikes announce instability."),
    Panel(LEARNING, "Learning rate", "", {"rate": "loss/lr"}, "The schedule."),
    Panel(LEARNING, "Images without a score", "an iteration", {"failed": "images/failed"},
          "They leave gradient and moments."),
    Panel(DIVERSITY, "Flat groups", "of an iteration", {"flat": "groups/flat"},
          "Groups whose rewards are all equal: nothing is learned from them."),
    Panel(DIVERSITY, "Spread of the LOO-FID reward", "deviation",
          {"between classes": "fid/between_classes", "within classes": "fid/within_classes"},
          "Which classes lack images, and which images of a class."),
    Panel(SPEED, "Images", "per second", {"images": "time/images_per_s"},
          "Sampled, scored and learned from."),
    Panel(SPEED, "Time of an iteration", "seconds",
          {"iteration": "time/iteration", "wait: samples": "time/wait_groups",
           "wait: learner": "time/wait_learner", "wait: moments": "time/wait_moments"},
          "The whole, and what the driver waits for: the largest wait is the bottleneck."),
    Panel(SPEED, "Restarts of workers", "so far", {"restarts": "fleet/restarts"},
          "Replaced after a crash or a hang."),
)  # fmt: skip

JUDGE = {
    "fid": "FID by the judge",
    "coverage": "Coverage",
    "recall": "Recall",
    "density": "Density",
    "precision": "Precision",
    "accuracy": "Class accuracy",
    "vendi": "Vendi score within classes",
    "clip": "CLIP score by the judge",
    "hps": "HPSv2 by the judge",
    "r_precision": "R-precision by the judge's CLIP",
    "entropy": "Token entropy",
    "sfid": "Spatial FID (sFID)",
    "inception_score": "Inception Score",
}
"""Figure of an evaluation -> title of its chart; others follow under their own names."""


@dataclass
class Topic:
    """A part of the page with charts."""

    name: str
    about: str
    charts: list[Chart] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    """One line for each chart that would show a single number."""
    missing: list[str] = field(default_factory=list)
    """One line for each chart that has no data."""


def topics(runs: Sequence[RunData]) -> list[Topic]:
    """The curves of one run, or of several over each other."""
    found = {name: Topic(name, about) for name, about in TOPICS.items()}
    found[REWARDS].charts += _rewards(runs)
    if not found[REWARDS].charts:
        found[REWARDS].missing.append("rewards appear after the first iteration")
    if len(runs) == 1:
        _of_one_run(runs[0], found)
    for panel in (*PANELS, *_of_spaces(runs)):
        chart = _chart(panel, runs)
        if chart is not None and (value := _constant(chart)) is not None:
            line = f"{chart.title}: {value:.3g} in every iteration. {chart.note}"
            found[panel.topic].constant.append(line)
        elif chart is not None:
            found[panel.topic].charts.append(chart)
        elif panel.missing or not any(run.metrics for run in runs):
            why = panel.missing or "it appears after the first iteration"
            found[panel.topic].missing.append(f"{panel.title}: {why}")
    return list(found.values())


def _of_spaces(runs: Sequence[RunData]) -> list[Panel]:
    """The panels of the distribution reward, for the one in each further feature space."""
    names = dict.fromkeys(name for run in runs for name in run.names(FID) if "/" in name)
    return [
        replace(
            panel,
            title=f"{panel.title}: {space}",
            lines={line: f"{FID}{space}/{name[len(FID) :]}" for line, name in panel.lines.items()},
        )
        for space in dict.fromkeys(name.partition("/")[0] for name in names)
        for panel in PANELS
        if all(name.startswith(FID) for name in panel.lines.values())
    ]


def _of_one_run(run: RunData, found: Mapping[str, Topic]) -> None:
    """Charts that are computed from several records."""
    if agreement := agreement_chart(run):
        found[DISTRIBUTION].charts.append(agreement)
    else:
        found[DISTRIBUTION].missing.append(
            "Whether reward and judge agree appears with evaluations: --evaluation.every"
        )
    if spread := spread_chart(run):
        found[DIVERSITY].charts.append(spread)


def _constant(chart: Chart) -> float | None:
    """The value that all lines have at all iterations, of two or more; None if there is none."""
    values = {value for line in chart.lines for value in line.y if math.isfinite(value)}
    several = any(len(line.y) > 1 for line in chart.lines)
    return values.pop() if len(values) == 1 and several else None


def _rewards(runs: Sequence[RunData]) -> list[Chart]:
    names = dict.fromkeys(name for run in runs for name in run.names("reward/"))
    found = []
    for name in sorted(names, key=is_loo_fid):
        lines = []
        for number, run in enumerate(runs, 1):
            low, high = (run.column(f"reward_{q}/{name}") for q in ("p05", "p95"))
            band = (low, high) if len(runs) == 1 and has_values(low) else (None, None)
            values = run.column(f"reward/{name}")
            lines.append(_line(runs, number, run, values, name, *band))
        note = (
            "By how much each image lowers FID; the mean is near 0 by construction, the band shows "
            "how far images differ."
            if is_loo_fid(name)
            else f"Weight {_weight(runs, name)}; normalised before it is added to the others."
        )
        found.append(Chart(f"reward-{name}", name, "higher is better", note, lines))
    return found


def _weight(runs: Sequence[RunData], name: str) -> str:
    weights = dict.fromkeys(run.setting(f"rewards.{name}.weight") for run in runs)
    known = [f"{weight:g}" for weight in weights if isinstance(weight, int | float)]
    return ", ".join(known) or "as configured (rewards.extra)"


def _line(
    runs: Sequence[RunData],
    number: int,
    run: RunData,
    values: list[float],
    name: str,
    low: list[float] | None = None,
    high: list[float] | None = None,
) -> Line:
    """A line of a run: among several, named after it."""
    several = len(runs) > 1
    shown = run.name if several else name
    return Line(shown, run.iterations, values, number, low, high, grouped=several)


def _chart(panel: Panel, runs: Sequence[RunData]) -> Chart | None:
    """One line a metric; of several runs the first metric, one line a run."""
    lines = []
    if len(runs) == 1:
        for number, (name, metric) in enumerate(panel.lines.items(), 1):
            values = runs[0].column(metric)
            if has_values(values):
                lines.append(Line(name, runs[0].iterations, values, number))
    else:
        metric = next(iter(panel.lines.values()))
        for number, run in enumerate(runs, 1):
            lines.append(_line(runs, number, run, run.column(metric), ""))
    if not any(has_values(line.y) for line in lines):
        return None
    name = next(iter(panel.lines))
    more = f" ({name})" if len(runs) > 1 and len(panel.lines) > 1 else ""
    key = re.sub(r"\W+", "-", panel.title.lower())
    return Chart(key, panel.title + more, panel.unit, panel.note, lines)


def judge_points(run: RunData, figure: str) -> tuple[list[float], list[float]]:
    """Iterations and values of a figure: base policy, evaluations while training, tuned policy."""
    points: dict[float, float] = {}
    if "base" in run.table:
        points[0.0] = plain_number(run.table["base"].get(figure))
    for row in run.evaluations:
        points[plain_number(row.get(STEP))] = plain_number(row.get(figure))
    if TUNED in run.table:
        points[float(run.done)] = plain_number(run.table[TUNED].get(figure))
    return list(points), list(points.values())


def evaluation_charts(
    runs: Sequence[RunData], better: Mapping[str, str]
) -> tuple[list[Chart], dict[str, list[Chart]]]:
    """Figures of the judge over the iterations: in its main features, and in each other space."""
    there = dict.fromkeys(
        key for run in runs for row in (*run.table.values(), *run.evaluations) for key in row
    )
    found: dict[str, list[Chart]] = {"": []}
    for name in by_space(there, JUDGE):
        if name not in (STEP, "images") and (chart := judge_chart(runs, name, better)):
            found.setdefault(space_name(name), []).append(chart)
    return found.pop(""), found


def judge_chart(runs: Sequence[RunData], figure: str, better: Mapping[str, str]) -> Chart | None:
    lines = []
    for number, run in enumerate(runs, 1):
        steps, values = judge_points(run, figure)
        if has_values(values):
            name = run.name if len(runs) > 1 else "policy"
            line = Line(name, steps, values, number, markers=True, grouped=len(runs) > 1)
            lines.append(line)
    if not lines:
        return None
    levels = []
    if len(runs) == 1:
        for name, row in runs[0].table.items():
            if name.startswith("base,") and has_values([plain_number(row.get(figure))]):
                levels.append(Level(name.removeprefix("base, "), row[figure]))
    plain = split_figure(figure)[1]
    direction = better.get(plain, "")
    unit = f"{direction} is better" if direction else ""
    return Chart(f"judge-{figure}", JUDGE.get(plain, figure), unit, "", lines, levels)


def agreement_chart(run: RunData) -> Chart | None:
    """FID of the reward and of the judge, each as a share of its start."""
    reward = run.column("fid/ema")
    steps, judge = judge_points(run, "fid")
    lines = list[Line]()
    for name, x, y in (("reward", run.iterations, reward), ("judge", steps, judge)):
        start = next((value for value in y if value > 0), 0.0)
        if start and sum(value == value for value in y) > 1:
            part = [100 * value / start for value in y]
            lines.append(Line(name, x, part, len(lines) + 1, markers=name == "judge"))
    if len(lines) < 2:
        return None
    return Chart("agreement", "Do reward and judge agree?", "FID, % of its start",
                 "Both should fall. Where the reward's falls and the judge's rises, the policy "
                 "exploits the reward's features.", lines)  # fmt: skip


def spread_chart(run: RunData) -> Chart | None:
    """Deviation of each reward over an iteration's images, as a share of its start."""
    lines = []
    for number, name in enumerate(run.names("reward_std/"), 1):
        values = run.column(f"reward_std/{name}")
        start = next((value for value in values if value > 0), 0.0)
        if start and len(values) > 1:
            part = [100 * value / start for value in values]
            lines.append(Line(name, run.iterations, part, number))
    if not lines:
        return None
    return Chart("spread", "Deviation of each reward", "% of its start",
                 "Over an iteration's images. Near 0, all images score alike: there is nothing "
                 "left to learn from, or all are one image.", lines)  # fmt: skip

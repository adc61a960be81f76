"""Grafana's board and Prometheus's alerts against the metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray.dashboard.modules.metrics.dashboards.default_dashboard_panels as ray_panels
import yaml

import cluster.deploy.monitoring
from cluster.control.control_actor import FleetStatus, PoolStatus, Progress
from cluster.ray_backend.prometheus import FAMILIES, SINGLE, samples

FOLDER = Path(cluster.deploy.monitoring.__file__).parent
BOARD = json.loads((FOLDER / "grafana.json").read_text())
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
METRIC = re.compile(r"\bray_[a-z_]+")
SELECTED = re.compile(r"\b(ray_[a-z_]+)\{([^}]*)\}")
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def exported() -> dict[str, set[str]]:
    """Metric that a job exports -> its labels, by the code that exports it."""
    metrics = {**dict.fromkeys(SINGLE, 1.0), **{f"{prefix}x": 1.0 for prefix in FAMILIES}}
    pool = PoolStatus(role="reward-server", serving=1, starting=0, draining=0, queued=0, wanted=1)
    found: dict[str, set[str]] = {}
    for unit in ("iteration", "image"):
        progress = Progress(unit=unit, iterations=2, metrics=metrics)
        for each in samples(FleetStatus(pools=(pool,), progress=progress)):
            found[f"ray_{each.name}"] = {"run", *each.labels}
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    of_panels = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [*of_panels, *(rule["expr"] for rule in RULES)]


def test_every_metric_is_exported() -> None:
    ours = exported()
    assert len(ours) > 15
    rays = set(METRIC.findall(Path(ray_panels.__file__).read_text()))  # of Ray's own board
    used = {name for text in expressions() for name in METRIC.findall(text)}
    assert {name for name in used if name.startswith("ray_tessera_")} - set(ours) == set()
    assert {name for name in used if not name.startswith("ray_tessera_")} - rays == set()


def test_every_label_is_exported() -> None:
    ours = exported()
    for text in expressions():
        for metric, selector in SELECTED.findall(text):
            if metric in ours:
                assert set(re.findall(r"(\w+)\s*[=!]~?", selector)) <= ours[metric], text


def test_everything_that_a_job_exports_is_on_the_board() -> None:
    shown = {name for text in expressions() for name in METRIC.findall(text)}
    assert set(exported()) - shown == set()


def test_the_board_can_be_imported() -> None:
    """By Grafana's rules: unique ids, no panel on another, variables that exist."""
    assert {each["name"] for each in BOARD["templating"]["list"]} == {"datasource", "run"}
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {"run"}
            assert ("$run" in target["expr"]) == ("ray_tessera_" in target["expr"])


@promtool
def test_prometheus_reads_the_alerts_and_the_boards_expressions(tmp_path: Path) -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", str(FOLDER / "alerts.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(RULES)} rules found" in done.stdout
    rules = [{"record": f"panel:{number}", "expr": text.replace("$run", ".*")}
             for number, text in enumerate(expressions())]  # fmt: skip
    (tmp_path / "panels.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "b", "rules": rules}]})
    )
    line = ["promtool", "check", "rules", str(tmp_path / "panels.yml")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(name: str, **series: str) -> list[dict[str, str]]:
    """Input series of a run, in Prometheus's notation, a value a minute."""
    return [
        {"series": f'ray_tessera_{metric}{{run="{name}"{labels}}}', "values": values}
        for key, values in series.items()
        for metric, _, rest in [key.partition("__")]
        for labels in [{"": "", "sampler": ',role="sampler",state="serving"',
                        "reward": ',role="reward-server",state="serving"',
                        "queue": ',role="reward-server"', "iteration": ',phase="iteration"'}[rest]]
    ]  # fmt: skip


CALM = {"iterations_done": "0+1x120", "iterations_planned": "1000x120", "restarts": "0x120",
        "images_failed": "0x120", "staleness": "1x120", "mismatch_kl": "0.001x120",
        "workers__reward": "2x120", "queued__queue": "3x120",
        "phase_seconds__iteration": "60x120"}  # fmt: skip
SHARE = 'ray_resources{instance="n1",Name="object_store_memory",State="%s"}'
STORE = [
    {"series": SHARE % "USED", "values": "1x120"},
    {"series": SHARE % "AVAILABLE", "values": "99x120"},
]
OBJECTS = 'ray_object_store_memory{instance="n1",Location="%s"}'
GONE = dict.fromkeys(CALM, "5x80 _x40") | {"iterations_planned": "9x80 _x40"}
CAUSES = {
    "TesseraRunStalls": run("r", **CALM | {"iterations_done": "0+1x20 20x100"}),
    "TesseraRunGone": run("r", **GONE),
    "TesseraRoleWithoutWorkers": run("r", **CALM | {"workers__reward": "2x60 0x60"}),
    "TesseraWorkersAreReplaced": run("r", **CALM | {"restarts": "0x90 3x30"}),
    "TesseraImagesFail": run("r", **CALM | {"images_failed": "0x60 2x60"}),
    "TesseraStaleness": run("r", **CALM | {"staleness": "1x60 5x60"}),
    "TesseraMismatchKl": run("r", **CALM | {"mismatch_kl": "0.001x60 0.5x60"}),
    "TesseraRewardQueue": run("r", **CALM | {"queued__queue": "3x60 25x60"}),
    "RayObjectStoreNearlyFull": [
        {"series": OBJECTS % "MMAP_SHM", "values": "50x60 95x60"},
        *STORE,
    ],
    "RaySpills": [
        {"series": OBJECTS % "SPILLED", "values": "0x60 2e9x60"},
    ],
}  # fmt: skip


@promtool
@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_an_alert_fires_for_its_cause_alone(alert: str, tmp_path: Path) -> None:
    """110 minutes in, with its cause; in a calm run, and at half the time, never."""
    of_node = alert.startswith("Ray")
    labels = {"instance": "n1"} if of_node else {"run": "r"}
    if alert in ("TesseraRoleWithoutWorkers", "TesseraRewardQueue"):
        labels["role"] = "reward-server"
    rule = next(each for each in RULES if each["alert"] == alert)
    tests = []
    calm = [*run("r", **CALM), *STORE]
    for series, minutes, fires in ((CAUSES[alert], 110, True), (CAUSES[alert], 45, False),
                                   (calm, 110, False)):  # fmt: skip
        expected = [{"exp_labels": labels | rule["labels"]}] if fires else []
        tests.append({
            "interval": "1m", "input_series": series,
            "alert_rule_test": [
                {"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": expected}
            ],
        })  # fmt: skip
    bare = {
        "groups": [{"name": "t", "rules": [{k: v for k, v in rule.items() if k != "annotations"}]}]
    }
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(bare))
    document = {"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document))
    line = ["promtool", "test", "rules", "test.yml"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do() -> None:
    assert {rule["alert"] for rule in RULES} == set(CAUSES)
    for rule in RULES:
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in ("warning", "critical")

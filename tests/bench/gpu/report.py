"""Prints figures as they come, and the table at the end."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

from tests.bench.gpu.checks import Check
from tests.bench.gpu.expected import EXPECTED, Verdict, card_of, expectation
from tests.bench.gpu.supervisor import Ended, Event

INDENT = "    "


class Report:
    """What all checks found.

    Args:
        checks: that are to run.
    """

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = checks
        self._device = ""
        self._figures: list[dict[str, Any]] = []
        self._ended: list[Ended] = []

    def hear(self, event: Event) -> None:
        """A worker's event."""
        if event["kind"] == "figure":
            self._figure(event["check"], event["name"], event["value"])
        elif event["kind"] == "note":
            print(f"{INDENT}{event['text']}", flush=True)
        elif event["name"] != self._device:
            self._device = event["name"]
            print(f"device: {self._device}; {platform.platform()}", flush=True)

    def _figure(self, check: str, name: str, value: float) -> None:
        expected = expectation(name, card_of(self._device), EXPECTED)
        verdict = expected.judge(value) if expected else Verdict.RECORDED
        wanted = str(expected or "-")
        self._figures.append(
            {"check": check, "name": name, "value": value, "expected": wanted, "verdict": verdict}
        )
        print(f"RESULT gpu.{name}={value:.4g} expected={wanted}", flush=True)

    def end(self, ended: Ended) -> None:
        """A check ended."""
        self._ended.append(ended)
        print(f"-- {ended.check.name}: {self.outcome(ended)}, {ended.seconds:.1f} s", flush=True)
        for line in ended.reason.splitlines():
            print(f"{INDENT}{line}", flush=True)

    def outcome(self, ended: Ended) -> str:
        """The worst that a check found, in a word."""
        if ended.status != "done":
            return ended.status
        verdicts = {f["verdict"] for f in self._figures if f["check"] == ended.check.name}
        order = (Verdict.WRONG, Verdict.SLOWER)
        return next((v.value for v in order if v in verdicts), Verdict.PASSED.value)

    @property
    def exit_status(self) -> int:
        bad = {"failed", Verdict.WRONG.value}
        outcomes = {self.outcome(ended) for ended in self._ended}
        return 1 if outcomes & bad or len(self._ended) < len(self._checks) else 0

    def summary(self, seconds: float) -> None:
        """A line a check: its outcome, and the figures that missed or the reason."""
        print(f"\n{'check':<13}{'outcome':<22}{'s':>6}  figures")
        for ended in self._ended:
            mine = [f for f in self._figures if f["check"] == ended.check.name]
            held = sum(f["verdict"] is Verdict.PASSED for f in mine)
            missed = [f for f in mine if f["verdict"] in (Verdict.WRONG, Verdict.SLOWER)]
            text = "; ".join(f"{f['name']} {f['value']:.4g}, not {f['expected']}" for f in missed)
            reason = ended.reason.splitlines()[-1] if ended.reason else ""
            note = "; ".join(filter(None, [f"{held} as expected" if held else "", text, reason]))
            outcome = self.outcome(ended)
            print(f"{ended.check.name:<13}{outcome:<22}{ended.seconds:>6.1f}  {note}")
        counts = [self.outcome(ended) for ended in self._ended]
        kinds = {kind: counts.count(kind) for kind in sorted(set(counts))}
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        print(f"{told or 'no check ended'}; {seconds:.0f} s on {self._device or 'no device'}")

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self._device,
            "figures": [{**f, "verdict": f["verdict"].value} for f in self._figures],
            "checks": [
                {
                    "name": ended.check.name,
                    "outcome": self.outcome(ended),
                    "reason": ended.reason,
                    "seconds": ended.seconds,
                }
                for ended in self._ended
            ],
        }

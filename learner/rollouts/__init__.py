"""Rollouts of a run: requested ahead of learning, stored, and read back."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m learner.rollouts`; returns the exit status."""
    from learner.rollouts.command import run

    return run(arguments)

"""Deployment files: Kubernetes, Slurm and cloud machines, filled in from a preset and its plan."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m cluster.deploy`; returns the exit status."""
    from cluster.deploy.command import run

    return run(arguments)

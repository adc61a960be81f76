"""What is free of each node, for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.placement.labels import written
from cluster.placement.nodes import Node, amount

HIDDEN = ("ray.io/node-id",)  # labels that say nothing


def free_of(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Ready for JSON."""
    return [
        {
            "node": node.name,
            "free_cpus": node.cpus,
            "free_gpus": node.gpus,
            "accelerator_type": node.accelerator_type,
            "labels": {key: value for key, value in node.labels.items() if key not in HIDDEN},
        }
        for node in nodes
    ]


def free_lines(nodes: Sequence[Mapping[str, Any]], most: int) -> list[str]:
    """One line a node, of a cluster of several; at most `most`, and one that says how many more."""
    if len(nodes) < 2:
        return []
    lines = []
    for node in nodes[:most]:
        kind = [node["accelerator_type"]] if node["accelerator_type"] else []
        what = [amount(node["free_cpus"], node["free_gpus"]), *kind, written(node["labels"])]
        lines.append(f"free of {node['node']}: {', '.join(filter(None, what))}")
    more = [f"and {len(nodes) - most} more nodes"] if len(nodes) > most else []
    return lines + more

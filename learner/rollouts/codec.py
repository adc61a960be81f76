"""Scored groups as bytes, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from cluster.errors import CheckpointError
from cluster.io.checksum import UNREADABLE, pack_array, unpack_array
from cluster.messages import GroupScores, RolloutGroup, SampleRequest, ScoredGroup


def pack_group(group: ScoredGroup) -> bytes:
    """Everything but the request, which the configuration determines, and the spans."""
    rollouts, scores = group.rollouts, group.scores
    return msgpack.packb(
        {
            "key": list(rollouts.request.key),
            "version": rollouts.version,
            "tokens": pack_array(rollouts.tokens),
            "logprobs": pack_array(rollouts.logprobs),
            "entropies": pack_array(rollouts.entropies),
            "scores": _packed(scores.scores),
            "features": _packed(scores.features),
            "errors": list(scores.errors),
        }
    )


def unpack_group(request: SampleRequest, data: bytes) -> ScoredGroup:
    """Inverse of `pack_group`.

    Raises:
        CheckpointError: damaged, or of another request.
    """
    try:
        fields = msgpack.unpackb(data)
        if fields["key"] != list(request.key):
            raise CheckpointError(f"{request.key} was expected, found {fields['key']}")
        rollouts = RolloutGroup(
            request=request,
            version=fields["version"],
            tokens=unpack_array(fields["tokens"]),
            logprobs=unpack_array(fields["logprobs"]),
            entropies=unpack_array(fields["entropies"]),
        )
        scores = GroupScores(
            key=request.key,
            scores=_unpacked(fields["scores"]),
            features=_unpacked(fields["features"]),
            errors=tuple(fields["errors"]),
        )
    except UNREADABLE as error:
        raise CheckpointError(f"the group of {request.key} cannot be read: {error}") from error
    return ScoredGroup(rollouts=rollouts, scores=scores)


def _packed(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: pack_array(array) for name, array in arrays.items()}


def _unpacked(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: unpack_array(fields) for name, fields in arrays.items()}

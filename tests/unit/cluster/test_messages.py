from __future__ import annotations

import numpy as np
import pytest

from cluster.messages import (
    Condition,
    GroupScores,
    RequestKey,
    SampleRequest,
    SamplingSpec,
    merge_scores,
)
from cluster.spans import Span


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, found 0.0"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], found 0.0"),
        ({"top_p": 1.5}, "found 1.5"),
        ({"cfg_scale": -1.0, "guidance": "guided"}, "cfg_scale must be >= 0"),
        ({"guidance": "half"}, "none, guided or distil, found 'half'"),
        ({"cfg_scale": 2.0}, "no effect with guidance 'none'"),
    ],
)
def test_impossible_specs_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSpec(**fields)


def test_distil_samples_guided_and_learns_unguided() -> None:
    spec = SamplingSpec(temperature=0.9, top_k=5, top_p=0.8, cfg_scale=2.0, guidance="distil")
    assert spec.guided_sampling
    assert spec.learned() == SamplingSpec(temperature=0.9, top_k=5, top_p=0.8)


@pytest.mark.parametrize(
    "spec", [SamplingSpec(top_k=3), SamplingSpec(cfg_scale=1.5, guidance="guided")]
)
def test_other_modes_learn_what_they_sample(spec: SamplingSpec) -> None:
    assert spec.learned() is spec


def test_guided_at_scale_one_needs_one_branch() -> None:
    assert not SamplingSpec(guidance="guided").guided_sampling


def test_request_identity() -> None:
    request = SampleRequest(
        stream="train",
        iteration=3,
        group=1,
        condition=Condition(text="a three", class_index=3),
        num_rollouts=4,
        seed=0,
        spec=SamplingSpec(),
    )
    assert request.key == RequestKey("train", 3, 1)


@pytest.mark.parametrize("field", ["iteration", "group", "seed"])
def test_negative_identity_is_refused(field: str) -> None:
    fields = {"iteration": 0, "group": 0, "seed": 0, field: -1}
    with pytest.raises(ValueError, match="must be >= 0"):
        SampleRequest(
            stream="train",
            condition=Condition(text=""),
            num_rollouts=1,
            spec=SamplingSpec(),
            **fields,
        )


def test_valid_follows_from_errors() -> None:
    scores = GroupScores(
        key=RequestKey("train", 0, 0),
        scores={},
        features={},
        errors=(None, "clip: not finite", None),
    )
    assert scores.valid.tolist() == [True, False, True]


def part(name: str, values: list[float], errors: list[str | None], space: str = "") -> GroupScores:
    column = np.array(values, np.float32)
    return GroupScores(
        key=RequestKey("train", 0, 0),
        scores={name: column},
        features={space: column[:, None]} if space else {},
        errors=tuple(errors),
        spans=(Span(name, "score", 0.0, 1.0),),
    )


def test_scores_of_several_servers_are_merged() -> None:
    merged = merge_scores(
        [
            part("clip", [1, np.nan, 3], [None, "clip: a", None], space="features"),
            part("hps", [4, 5, np.nan], [None, None, "hps: b"]),
        ]
    )
    assert merged.errors == (None, "clip: a", "hps: b")
    assert list(merged.scores) == ["clip", "hps"]
    for values in (*merged.scores.values(), merged.features["features"][:, 0]):
        assert np.isnan(values[1:]).all()  # a failed image carries no number at all
        assert np.isfinite(values[0])
    assert [span.worker for span in merged.spans] == ["clip", "hps"]


def test_the_first_part_with_an_error_has_the_say() -> None:
    parts = [part("a", [np.nan], ["a: x"]), part("b", [np.nan], ["b: y"])]
    assert merge_scores(parts).errors == ("a: x",)
    assert merge_scores(parts[::-1]).errors == ("b: y",)


def test_one_part_is_as_it_came() -> None:
    one = part("a", [1.0], [None])
    assert merge_scores([one]) is one

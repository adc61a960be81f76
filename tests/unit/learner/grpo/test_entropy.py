"""Entropy controllers: pure functions of state and measurement, by hand."""

from __future__ import annotations

import math

import pytest

from learner.grpo.entropy import (
    EntropyConfig,
    EntropyState,
    Measured,
    PaperEntropy,
    initial_state,
    next_state,
    paper_coefficient,
)

V = 100


def measured(entropy: float, base: float | None = 2.5, progress: float = 0.5) -> Measured:
    return Measured(entropy=entropy, base_entropy=base, vocab_size=V, progress=progress)


def after(config: EntropyConfig, coefficient: float, entropy: float, base: float = 2.5) -> float:
    return next_state(config, EntropyState(coefficient), measured(entropy, base)).coefficient


def test_target_controller_steers_towards_the_base_entropy() -> None:
    config = EntropyConfig(controller="target", gain=0.1, max_coef=0.05)
    assert after(config, 0.01, entropy=2.0) == pytest.approx(0.03)
    assert after(config, 0.01, entropy=2.6) == pytest.approx(0.006)
    assert after(config, 0.04, entropy=1.0) == 0.05
    assert after(config, 0.001, entropy=5.0) == 0.0


def test_other_controllers_keep_still() -> None:
    fixed = EntropyConfig(controller="fixed", coef=0.02)
    assert initial_state(fixed).coefficient == after(fixed, 0.02, 1.0) == 0.02
    assert initial_state(EntropyConfig(controller="none", coef=0.02)).coefficient == 0.0


def test_damping_looks_at_a_moving_average() -> None:
    config = EntropyConfig(controller="target", gain=0.1, max_coef=1.0, damping=0.75)
    state = next_state(config, EntropyState(0.5), measured(2.0))
    assert state == EntropyState(pytest.approx(0.52), 2.0)
    state = next_state(config, state, measured(3.0))
    assert state.average == pytest.approx(0.75 * 2.0 + 0.25 * 3.0)
    assert state.coefficient == pytest.approx(0.52 + 0.1 * (2.5 - 2.25) / 2.5)


def test_a_target_of_ones_own_needs_no_base() -> None:
    config = EntropyConfig(controller="target", target=0.5, gain=1.0, max_coef=1.0)
    target = 0.5 * math.log(V)
    found = next_state(config, EntropyState(0.1), measured(target * 0.9, base=None))
    assert found.coefficient == pytest.approx(0.1 + 0.1)
    assert not config.needs_base
    with pytest.raises(ValueError, match="needs the base policy's entropy"):
        next_state(EntropyConfig(controller="target"), EntropyState(0.1), measured(2.0, base=None))


@pytest.mark.parametrize(
    ("gap", "progress", "expected"),
    [
        (0.0, 0.5, 2.2e-3),
        (0.015, 0.5, 2.2e-3),  # on the edge of the dead zone: inside
        (0.1, 0.5, 2.2e-3 * math.exp(0.3)),
        (-0.1, 0.5, 2.2e-3 * math.exp(-0.3)),
        (0.5, 0.5, 4e-3),  # ceiling
        (-1.5, 0.5, 7e-5),  # floor
        (0.0, 0.025, 1.1e-3),  # half of the warm-up
        (0.0, 0.0, 7e-5),
        (0.0, 0.85, 2.2e-3),
        (0.0, 0.925, 1.1e-3),  # half of the cosine
        (0.0, 1.0, 7e-5),
    ],
)
def test_paper_coefficient(gap: float, progress: float, expected: float) -> None:
    assert paper_coefficient(gap, progress) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "gap", "progress", "expected"),
    [
        ({"coef": 1e-3}, 0.0, 0.5, 1e-3),  # ENT_COEF_BASE
        ({"coef": 1e-3, "min_coef": 2e-3}, 0.0, 0.5, 2e-3),  # ENT_MIN
        ({"max_coef": 1e-3}, 0.0, 0.5, 1e-3),  # ENT_MAX
        ({"dead_zone": 0.2}, 0.1, 0.5, 2.2e-3),  # ENT_DEADBAND
        ({"sharpness": 1.0}, 0.1, 0.5, 2.2e-3 * math.exp(0.1)),  # ENT_K
        ({"warmup": 0.2}, 0.0, 0.1, 1.1e-3),  # WARMUP_FRAC
        ({"warmup": 0.0}, 0.0, 0.0, 2.2e-3),
        ({"decay_from": 0.5}, 0.0, 0.75, 1.1e-3),  # DECAY_START_FRAC
        ({"decay_from": 1.0}, 0.0, 1.0, 2.2e-3),
    ],
)
def test_its_constants_are_the_public_codes_variables(
    changes: dict, gap: float, progress: float, expected: float
) -> None:
    constants = PaperEntropy(**changes)
    assert paper_coefficient(gap, progress, constants) == pytest.approx(expected)
    config = EntropyConfig(controller="paper", target=0.5, paper=constants)
    scale = math.log(1000)
    found = Measured(
        entropy=(0.5 - gap) * scale, base_entropy=None, vocab_size=1000, progress=progress
    )
    coefficient = next_state(config, initial_state(config), found).coefficient
    assert coefficient == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes",
    [{"coef": -1.0}, {"min_coef": 1.0}, {"warmup": 0.9}, {"decay_from": 1.5}, {"sharpness": -1.0}],
)
def test_impossible_constants_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"entropy\.paper: "):
        PaperEntropy(**changes)


def test_paper_controller_measures_against_the_base_or_a_constant() -> None:
    state = EntropyState(0.0)
    base = next_state(EntropyConfig(controller="paper"), state, measured(2.0, base=2.5))
    assert base.coefficient == pytest.approx(2.2e-3 * math.exp(3 * 0.5 / math.log(V)))
    constant = next_state(EntropyConfig(controller="paper", target=0.78), state, measured(3.0))
    gap = 0.78 - 3.0 / math.log(V)
    assert constant.coefficient == pytest.approx(2.2e-3 * math.exp(3 * gap))


@pytest.mark.parametrize("fields", [{"coef": -1.0}, {"damping": 1.0}, {"target": 1.0}])
def test_impossible_settings_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        EntropyConfig(**fields)

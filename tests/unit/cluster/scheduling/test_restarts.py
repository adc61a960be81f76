"""How often a lost worker is replaced, and how soon."""

from __future__ import annotations

import pytest

from cluster.errors import FleetError
from cluster.scheduling.restarts import LONGEST_DELAY_S, RestartBudget


def test_the_first_loss_is_replaced_at_once_and_repeated_ones_later_and_later() -> None:
    budget = RestartBudget(limit=20)
    delays = [budget.spend("sampler-0", "was lost", now=0.0) for _ in range(9)]
    assert delays == [0, 1, 2, 4, 8, 16, 32, LONGEST_DELAY_S, LONGEST_DELAY_S]
    assert budget.spent == 9


def test_a_worker_that_has_answered_begins_anew() -> None:
    budget = RestartBudget(limit=20)
    for _ in range(3):
        budget.spend("sampler-0", "was lost", now=0.0)
    budget.worked("sampler-0")
    assert budget.spend("sampler-0", "was lost", now=0.0) == 0


def test_each_worker_has_a_budget_of_its_own() -> None:
    budget = RestartBudget(limit=1)
    assert [budget.spend(f"sampler-{i}", "was lost", now=0.0) for i in range(8)] == [0] * 8


def test_too_many_in_a_period_end_the_run_and_old_ones_do_not_count() -> None:
    budget = RestartBudget(limit=2, period_s=100)
    for now in (0.0, 60.0, 110.0, 170.0):
        budget.spend("learner", "was lost", now)
    with pytest.raises(
        FleetError, match=r"learner was lost, after 2 replacements in an hour.*--max-restarts"
    ):
        budget.spend("learner", "was lost", now=180.0)


def test_none_at_all_may_be_allowed() -> None:
    with pytest.raises(FleetError, match="sampler-3 did not answer: look at its log"):
        RestartBudget(limit=0).spend("sampler-3", "did not answer", now=0.0)

from __future__ import annotations

import pytest

from cluster.roles import AutoscaleConfig
from cluster.scheduling.autoscaling import Load, LoadMeter, desired_workers

AUTO = AutoscaleConfig(min=1, max=8, target_wait_s=1.0)


def desired(workers: int, wait: float, busy: float, config: AutoscaleConfig = AUTO) -> int:
    return desired_workers(config, Load(workers=workers, mean_wait_s=wait, busy_share=busy))


@pytest.mark.parametrize(
    ("workers", "wait", "busy", "expected"),
    [
        (2, 0.5, 1.0, 2),  # below the target: as it is, even when all are busy
        (2, 1.2, 1.0, 3),  # a little above: one more
        (4, 1.5, 1.0, 6),  # in proportion
        (2, 100.0, 1.0, 4),  # at most twice as many at once
        (8, 100.0, 1.0, 8),  # the upper bound
        (4, 0.0, 0.5, 3),  # 4 x .5 = 2 workers' work: 3 have time to spare
        (4, 0.0, 0.6, 4),  # 2.4 of 3 would be .8 busy: too tight
        (4, 0.3, 0.1, 4),  # work still waits
        (2, 0.0, 0.5, 2),  # one alone would be fully busy
        (1, 0.0, 0.0, 1),  # the lower bound
    ],
)
def test_decisions(workers: int, wait: float, busy: float, expected: int) -> None:
    assert desired(workers, wait, busy) == expected


def test_it_settles_instead_of_swinging() -> None:
    """Work for 3.2 workers: whatever it starts with, it comes to a number and stays there."""
    for start in range(1, 9):
        workers, seen = start, []
        for _ in range(20):
            busy = min(3.2 / workers, 1.0)
            wait = 0.05 if workers > 3.2 else 2.0 * 3.2 / workers
            workers = desired(workers, wait, busy)
            seen.append(workers)
        assert len(set(seen[-10:])) == 1
        assert seen[-1] in (4, 5, 6)


def test_the_lower_bound_holds() -> None:
    config = AutoscaleConfig(min=3, max=5)
    assert desired(3, 0.0, 0.0, config) == 3
    assert [config.bounded(count) for count in (1, 4, 9)] == [3, 4, 5]


def test_off_unless_there_is_an_upper_bound() -> None:
    assert not AutoscaleConfig().on
    assert AutoscaleConfig().bounded(70) == 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min": 4, "max": 2}, "min must be at most max, found 4 and 2"),
        ({"min": 2}, "set max, too"),
        ({"max": -1}, "must be >= 0"),
        ({"max": 2, "target_wait_s": 0.0}, "must be > 0 seconds"),
    ],
)
def test_configuration_validates(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoscaleConfig(**options)


def test_meter_by_hand() -> None:
    meter = LoadMeter(now=100.0)
    meter.waited(1.0)
    meter.waited(3.0)
    meter.worked(4.0)
    assert meter.age(110.0) == 10.0
    load = meter.load(workers=2, now=110.0)
    assert load == Load(workers=2, mean_wait_s=2.0, busy_share=0.2)
    meter.restart(110.0)
    assert meter.load(2, 111.0) == Load(workers=2, mean_wait_s=0.0, busy_share=0.0)

"""The smallest split that is nearly as fast as the fastest: GPUs that gain next to nothing are not
worth their price, nor workers that do their trouble."""

from __future__ import annotations

import bisect

from learner.capacity.scale.split import Plan, Search

WORTH = 1.02  # times as fast: what more GPUs must gain


def fewest_gpus(search: Search, gpus: int, staleness: int | None = None) -> Plan | None:
    """The best split of the fewest GPUs, `gpus` at most, that is within 2 % of the fastest one;
    None: none fits."""
    fastest = search.best(gpus, staleness)
    if fastest is None:
        return None
    enough = fastest.seconds * WORTH

    def suffice(number: int) -> bool:  # more GPUs are never slower
        plan = search.best(number, staleness)
        return plan is not None and plan.seconds <= enough

    numbers = range(1, fastest.split.gpus)
    return search.best(1 + bisect.bisect_left(numbers, True, key=suffice), staleness)

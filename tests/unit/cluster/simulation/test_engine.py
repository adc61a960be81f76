"""Virtual time, and processors and links that are shared in it, against closed forms."""

from __future__ import annotations

import pytest

from cluster.simulation.engine import Engine
from cluster.simulation.links import Links
from cluster.simulation.processors import Processor


def test_events_happen_in_the_order_of_their_times_then_of_their_plans() -> None:
    engine, seen = Engine(), list[tuple[str, float]]()
    for name, at in (("late", 5.0), ("first", 1.0), ("second", 1.0), ("off", 2.0)):
        event = engine.after(at, lambda name=name: seen.append((name, engine.now)))
    event.cancel()
    engine.run(until=3.0)
    assert (seen, engine.now) == ([("first", 1.0), ("second", 1.0)], 3.0)
    engine.sleep(10.0)
    assert (seen[2:], engine.now) == ([("late", 5.0)], 13.0)
    assert engine.epoch() - engine.monotonic() > 1e9


def test_a_run_ends_as_soon_as_it_is_enough() -> None:
    engine, seen = Engine(), list[int]()
    for number in range(5):
        engine.after(number, lambda number=number: seen.append(number))
    engine.run(until=100.0, done=lambda: len(seen) == 2)
    assert (seen, engine.now) == ([0, 1], 1.0)


@pytest.mark.parametrize(
    ("capacity", "jobs", "ends"),
    [
        # (start, seconds alone, cores) -> end
        (2.0, [(0.0, 3.0, 1.0), (0.0, 5.0, 1.0)], [3.0, 5.0]),
        (1.0, [(0.0, 3.0, 1.0), (0.0, 5.0, 1.0)], [6.0, 8.0]),
        (1.0, [(0.0, 4.0, 1.0), (2.0, 1.0, 1.0)], [5.0, 4.0]),
        (2.0, [(0.0, 2.0, 2.0), (0.0, 2.0, 2.0)], [4.0, 4.0]),
        (2.0, [(0.0, 2.0, 1.0), (0.0, 2.0, 1.0), (0.0, 2.0, 1.0)], [3.0, 3.0, 3.0]),
        (4.0, [(1.0, 2.0, 8.0)], [5.0]),
    ],
)
def test_jobs_share_a_processor(
    capacity: float, jobs: list[tuple[float, float, float]], ends: list[float]
) -> None:
    engine = Engine()
    processor, found = Processor(engine, capacity), dict[int, float]()
    for number, (start, seconds, cores) in enumerate(jobs):

        def begin(number: int = number, seconds: float = seconds, cores: float = cores) -> None:
            processor.start(seconds, cores, lambda: found.__setitem__(number, engine.now))

        engine.after(start, begin)
    engine.run(until=100.0)
    assert [found[number] for number in range(len(jobs))] == pytest.approx(ends)
    work = sum(seconds * cores for _, seconds, cores in jobs)
    assert processor.busy_s == pytest.approx(work)


def test_a_cancelled_job_leaves_its_share_to_the_others() -> None:
    engine, ends = Engine(), list[float]()
    processor = Processor(engine, 1.0)
    gone = processor.start(10.0, 1.0, lambda: ends.append(-1.0))
    processor.start(3.0, 1.0, lambda: ends.append(engine.now))
    engine.run(until=2.0)
    processor.cancel(gone)
    processor.cancel(gone)  # once is enough
    engine.run(until=50.0)
    assert ends == pytest.approx([4.0])  # one second of three was done in the first two


@pytest.mark.parametrize(
    ("flows", "ends"),
    [
        # (from, to, bytes) at 100 bytes/s -> end, s
        ([(0, 1, 200)], [2.0]),
        ([(0, 1, 200), (0, 2, 200)], [4.0, 4.0]),  # one link out
        ([(1, 0, 200), (2, 0, 200)], [4.0, 4.0]),  # one link in
        ([(0, 1, 200), (1, 0, 200)], [2.0, 2.0]),  # both directions
        ([(0, 1, 100), (0, 2, 200)], [2.0, 3.0]),
        ([(0, 1, 200), (2, 3, 200)], [2.0, 2.0]),
        ([(1, 1, 200)], [0.0]),  # within a host
    ],
)
def test_flows_share_links(flows: list[tuple[int, int, int]], ends: list[float]) -> None:
    engine = Engine()
    links, found = Links(engine, 4, 100.0, 0.0), dict[int, float]()
    for number, (sender, receiver, size) in enumerate(flows):
        links.send(
            sender, receiver, size, lambda number=number: found.__setitem__(number, engine.now)
        )
    engine.run(until=100.0)
    assert [found[number] for number in range(len(flows))] == pytest.approx(ends)
    across = sum(size for sender, receiver, size in flows if sender != receiver)
    assert (sum(links.sent), sum(links.received)) == (across, across)


def test_weights_that_fan_out_take_as_many_times_as_there_are_hosts() -> None:
    engine = Engine()
    links, ends = Links(engine, 9, 100.0, 0.0), list[float]()
    for host in range(1, 9):
        links.send(0, host, 300, lambda: ends.append(engine.now))
    engine.run(until=100.0)
    assert ends == pytest.approx([24.0] * 8)

"""What Ray says of workers that fail, as one message."""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError

import rewards.base  # noqa: F401  (its errors are known where the driver has it)
from cluster.ray_session.calls import how_ended, last_words, place_of
from cluster.scheduling.in_flight import FleetError, PendingBatch, PendingGroup
from tests.unit.helpers import request

TRACEBACK = """\
The actor died because of an error raised in its creation task, \x1b[36mray::A.__init__()\x1b[39m
 (pid=1, ip=127.0.0.1, actor_id=41, repr=<a.A object at 0x7fb8>)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/some/where/outer.py", line 6, in __init__
    build()
  File "/some/where/inner.py", line 12, in build
    raise Error(
    ^^^^^^^^^^^^
"""


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("cluster.errors.ConfigError: policy: no such file", "policy: no such file"),
        (
            "cluster.errors.CheckpointError: first: line\n  second: line\nthird",
            "first: line\n  second: line\nthird",
        ),
        ("rewards.base.ImageErrors: two rows", "two rows"),
        ("ValueError: bad: value", "ValueError: bad: value (inner.py, line 12)"),
        ("KeyError: 'x'\n", "KeyError: 'x' (inner.py, line 12)"),
        ("torch.OutOfMemoryError: much", "torch.OutOfMemoryError: much (inner.py, line 12)"),
        ("AssertionError", "AssertionError (inner.py, line 12)"),
        (
            "ValueError: of another\n\nThe above exception was the direct cause of the following "
            'exception:\n\n  File "/some/where/outer.py", line 9, in __init__\n    raise\n'
            "cluster.errors.ConfigError: clear",
            "clear",
        ),
    ],
)
def test_a_traceback_ends_in_one_message(end: str, words: str) -> None:
    assert last_words(TRACEBACK + end) == words


def test_what_is_no_traceback_stays_as_it_is() -> None:
    assert last_words("something odd") == "something odd"
    assert last_words("") == ""


DIED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{DIED}Worker exits with an exit code 3.", "its process ended with exit status 3"),
        (
            f"{DIED}Worker unexpectedly exits with a connection error code 2. End of file. Some",
            "its process ended without a word: a crash as by SIGSEGV, os._exit, a kill, or too ",
        ),
        ("The actor died because its node has died. Node Id: 3", "its machine is gone"),
        (
            "The actor died unexpectedly.\n\tpid: 7\n\tip: 203.0.113.9\nThe actor died because its "
            "node has died. Node Id: 3",
            "its machine 203.0.113.9 is gone",
        ),
        ("The actor 3 is unavailable: odd.\nmore", "The actor 3 is unavailable: odd."),
    ],
)
def test_how_a_process_ended(text: str, told: str) -> None:
    assert how_ended(RayActorError(error_msg=text)).startswith(told)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("ray::Sampler.sample() (pid=7, ip=203.0.113.9, actor_id=3)\n  File", "203.0.113.9"),
        ("ray::Sampler() (pid=7, ip=2001:db8::9, actor_id=3)", "2001:db8::9"),
        ("ray::Sampler() (pid=7, ip=192.0.2.7, actor_id=3)", ""),
        ("something odd", ""),
    ],
)
def test_where_a_worker_on_another_host_was(
    text: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.7")  # of this host
    assert place_of(RayActorError(error_msg=text)) == place


def test_a_group_that_ends_every_worker_names_them() -> None:
    group = PendingGroup(PendingBatch([None]), 0, request(group=3, iteration=5), ("reward-server",))
    group.count_loss(1, "reward-server-0", "was lost")
    group.count_loss(1, "reward-server-1", "ran out of memory")
    with pytest.raises(FleetError) as caught:
        group.count_loss(1, "reward-server-0", "was lost")
    assert str(caught.value).startswith(
        "3 workers were lost with group 3 of train 5 in hand (reward-server-0 was lost; "
        "reward-server-1 ran out of memory; reward-server-0 was lost): look at their logs"
    )

"""What foreign code does to its process stays with it: settings, generators, arguments, exits."""

from __future__ import annotations

import importlib
import logging
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError, FleetError
from cluster.fleet import InlineFleet
from cluster.messages import Condition
from learner.fleet_plan import fleet_plan
from rewards.base import ImageErrors
from rewards.config import RewardServerConfig
from rewards.scorers.isolation import SETTINGS, SIGNALS, Isolation
from rewards.scorers.user_rewards import load_user_reward, parse_user_reward
from rewards.servers.panel import Panel
from rewards.servers.reward_server import RewardServer
from tests.small_run import fingerprint, run_training, small_config
from tests.unit.helpers import request


def snapshot() -> dict[str, Any]:
    """All that the process has, settings and generators, and what torch computes under them."""
    found = {name: setting.get() for name, setting in SETTINGS.items()}
    numbers = np.random.get_state()
    return found | {
        "signals": SIGNALS.get(),
        "zone": time.strftime("%Z"),
        "generators": (random.getstate(), torch.get_rng_state().tolist(), numbers[1].tolist()),
        "tensor": (torch.ones(1).dtype, torch.ones(1).device, (torch.ones(1) / 3).tolist()),
    }


@pytest.fixture(scope="module")
def hostile() -> Any:
    """The module of hostile rewards, imported as a reward's module is."""
    sys.modules.pop("tests.hostile", None)
    before = snapshot()
    load_user_reward(parse_user_reward("tests.hostile:InPlace"), "cpu")
    assert snapshot() == before  # its import alone sets everything
    return sys.modules["tests.hostile"]


def test_an_import_sets_nothing_for_others(hostile: Any) -> None:
    assert len(hostile.SPOILS) > 20


def spoils() -> list[str]:
    with Isolation()(0):
        return list(importlib.import_module("tests.hostile").SPOILS)


@pytest.mark.parametrize("what", [*spoils(), "everything"])
def test_what_foreign_code_sets_is_undone(hostile: Any, what: str) -> None:
    before = snapshot()
    for seed in (0, 1):
        with Isolation()(seed):
            hostile.spoil() if what == "everything" else hostile.SPOILS[what]()
        assert snapshot() == before


def test_it_is_undone_where_foreign_code_fails(hostile: Any) -> None:
    before = snapshot()
    with pytest.raises(SystemExit), Isolation()(0):
        fail_after(hostile.spoil)
    assert snapshot() == before


def test_a_logger_that_is_not_there_yet_cannot_be_muted(hostile: Any) -> None:
    """A module of ours that is imported later logs all the same."""
    logging.root.manager.loggerDict.pop("learner.of_a_later_import", None)
    with Isolation()(0):
        hostile.SPOILS["logging"]()
        hostile.SPOILS["handlers"]()
    for name in ("learner.of_a_later_import", "cluster", "learner"):
        assert logging.getLogger(name).isEnabledFor(logging.WARNING)
        assert logging.getLogger(name).filters == []


def fail_after(act: Callable[[], None]) -> None:
    act()
    sys.exit(1)


def test_foreign_code_finds_again_what_it_set() -> None:
    isolated, before = Isolation(), snapshot()
    with isolated(0):
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("high")
        sys.path.append("/theirs")
    for _ in range(2):
        assert snapshot() == before
        with isolated(0):
            assert torch.ones(1).dtype == torch.float64
            assert torch.get_float32_matmul_precision() == "high"
            assert "/theirs" in sys.path
    with isolated(0):
        torch.set_default_dtype(torch.float32)
    with isolated(0):
        assert torch.ones(1).dtype == torch.float32
    assert snapshot() == before


def test_a_precision_set_twice_over_is_undone() -> None:
    """The old switch moves the new ones; foreign code that hides this is undone as well."""
    before = snapshot()
    with Isolation()(0):
        torch.set_float32_matmul_precision("medium")
        torch.backends.mkldnn.matmul.fp32_precision = before["mkldnn matmul fp32"]
    assert snapshot() == before


def test_pieces_in_two_threads_do_not_see_each_other() -> None:
    before, errors = snapshot(), []

    def one(dtype: torch.dtype) -> None:
        isolated = Isolation()
        for _ in range(20):
            with isolated(0):
                torch.set_default_dtype(dtype)
                time.sleep(0.001)
                if torch.ones(1).dtype != dtype:
                    errors.append(dtype)

    threads = [
        threading.Thread(target=one, args=(dtype,)) for dtype in (torch.float64, torch.float16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert snapshot() == before


def score(extra: str) -> Any:
    return load_user_reward(parse_user_reward(extra), "cpu")


IMAGES = np.random.default_rng(0).integers(1, 256, (4, 8, 8, 3), np.uint8)
CONDITIONS = [Condition(text=str(index), class_index=index) for index in range(4)]


def test_every_scorer_has_the_images_and_conditions_that_the_first_had(hostile: Any) -> None:
    """In an array, in a list of several sizes, and one by one after a failure."""
    features = np.ones((3, 5), np.float32)
    asked = [Condition(text="words", class_index=1, features=features)] * 4
    for images in (IMAGES.copy(), [*IMAGES[:3].copy(), IMAGES[3, :5].copy()]):
        kept = [np.array(image) for image in images]
        scorers = {"first": score("tests.hostile:InPlace"), "again": score("tests.hostile:Spoils")}
        scored = Panel(scorers, {}).score(images, asked)
        expected = [image.mean() / 255 for image in kept]
        for name in scorers:
            np.testing.assert_allclose(scored.scores[name], expected, rtol=1e-6)
        assert all(np.array_equal(image, was) for image, was in zip(images, kept))
    assert features.all()
    assert asked[0].text == "words"


def test_images_of_our_own_scorers_cannot_be_written_to() -> None:
    flags: list[bool] = []

    def ours(images: Any, conditions: Any) -> np.ndarray:
        flags.extend(image.flags.writeable for image in images)
        flags.append(getattr(images, "flags", images[0].flags).writeable)
        return np.ones(len(images))

    panel = Panel({"ours": ours}, {}, max_batch=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panel.score(IMAGES.copy(), CONDITIONS)
        panel.score([*IMAGES[:3].copy(), IMAGES[3, :5].copy()], CONDITIONS)
    assert flags
    assert not any(flags)


def test_an_answer_does_not_change_with_the_next_one() -> None:
    panel = Panel({"reuses": score("tests.hostile:Reuses")}, {})
    first = panel.score(IMAGES, CONDITIONS).scores["reuses"]
    kept = first.copy()
    panel.score(255 - IMAGES, CONDITIONS)
    assert first.tolist() == kept.tolist()
    alone = Panel({"reuses": score("tests.hostile:Reuses")}, {}, max_batch=1)
    assert alone.score(IMAGES, CONDITIONS).scores["reuses"].tolist() == kept.tolist()


class Draws:
    """A score that is drawn, as scorers with random crops have it."""

    def __init__(self, device: str) -> None:
        self._bias = random.random() + float(torch.rand(()))

    def __call__(self, images: Any, conditions: Any) -> torch.Tensor:
        drawn = random.random() + np.random.rand() + torch.rand(len(images), requires_grad=True)
        return (drawn + self._bias).to(torch.bfloat16)


def test_a_scorer_that_draws_draws_the_same_on_every_server_and_again() -> None:
    random.seed(1)
    first = score("tests.unit.rewards.scorers.test_isolation:Draws")
    random.seed(2)
    torch.manual_seed(2)
    second = score("tests.unit.rewards.scorers.test_isolation:Draws")
    first(IMAGES[:2], CONDITIONS[:2])
    found = first(IMAGES, CONDITIONS)
    assert found.dtype == np.float32
    assert found.tolist() == second(IMAGES, CONDITIONS).tolist()
    assert found.tolist() != second(IMAGES[::-1], CONDITIONS).tolist()


def server(*extra: str, **options: Any) -> RewardServer:
    shipped = {"clip": {"enabled": False}, "hps": {"enabled": False}}
    config = small_config(rewards={**shipped, "extra": list(extra)}).rewards
    return RewardServer(RewardServerConfig(rewards=config, judge=None, **options))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("exit", "ends: SystemExit: 0 (hostile.py, line "),
        ("interrupt", "ends: KeyboardInterrupt: "),
        ("cancelled", "ends: CancelledError: "),
        ("generator", "ends: GeneratorExit: "),
        ("limit", "ends: TimeLimit: too slow (hostile.py"),
        ("stop", "ends: StopIteration: "),
        ("memory", "ends: MemoryError: "),
        ("unreadable", "ends: Unreadable: (its message cannot be read: SystemExit)"),
        ("surrogate", r"ends: ValueError: no file \udcff (hostile.py"),
        ("long", "ends: ValueError: xxxx"),
    ],
)
def test_whatever_a_scorer_raises_is_the_images_error(hostile: Any, how: str, told: str) -> None:
    asked = server(f"tests.hostile:Ends=1,how={how}")
    images = np.array([IMAGES[0], IMAGES[1] * 0, IMAGES[2]])
    for _ in range(2):  # the server lives
        scored = asked.score(request(rollouts=3), images)
        assert scored.errors[::2] == (None, None)
        assert scored.errors[1] is not None
        assert scored.errors[1].startswith(told)
        assert len(scored.errors[1].encode()) < 1000
        assert scored.scores["ends"][::2].tolist() == [1, 1]


@pytest.mark.parametrize(
    "errors", [{-1: "no"}, {9: "no"}, {"first": "no"}, {None: "no"}, {0: 3}, {0: "a\nb \udcff"}]
)
def test_rows_that_are_none_are_no_endless_question(errors: dict[Any, Any]) -> None:
    def odd(images: Any, conditions: Any) -> np.ndarray:
        raise ImageErrors(errors)

    scored = Panel({"odd": odd}, {}).score(IMAGES[:2], CONDITIONS[:2])
    assert all(error and error.startswith("odd: ") for error in scored.errors)
    assert all("\n" not in error and error.encode() for error in scored.errors if error)


@pytest.mark.parametrize("how", ["exit", "interrupt", "limit", "unreadable", "memory"])
@pytest.mark.parametrize("late", [False, True])
def test_a_scorer_that_cannot_start_is_one_clear_error(hostile: Any, how: str, late: bool) -> None:
    """Built where Ctrl-C cannot come from, as on Ray; in the main thread it is the user's."""
    found: list[BaseException] = []

    def build() -> None:
        try:
            server(f"tests.hostile:FailsToStart=1,how={how},late={late}")
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    thread.join(60)
    (error,) = found
    assert isinstance(error, ConfigError)
    what = "failed in its warm()" if late else "cannot be built"
    assert str(error).startswith(f"rewards.extra: tests.hostile:FailsToStart {what}: ")
    assert "hostile.py, line" in str(error)


def test_ctrl_c_while_a_scorer_is_built_is_the_users(hostile: Any) -> None:
    before = snapshot()
    with pytest.raises(KeyboardInterrupt):
        server("tests.hostile:FailsToStart=1,how=interrupt")
    assert snapshot() == before


class Hangs:
    """Until it is told to go on."""

    on = threading.Event()

    def __init__(self, device: str) -> None:
        pass

    def __call__(self, images: Any, conditions: Any) -> np.ndarray:
        self.on.wait(60)
        return np.ones(len(images))


def test_a_scorer_that_never_answers_is_named_with_its_request() -> None:
    asked = server("tests.unit.rewards.scorers.test_isolation:Hangs=1", timeout_s=0.2)
    expected = (
        r"reward-server has been at group 3 of train 5 \(scorer hangs\) for \d+ s \(--timeout"
    )
    try:
        with pytest.raises(FleetError, match=expected):
            asked.score(request(group=3, iteration=5, rollouts=2), IMAGES[:2])
    finally:
        Hangs.on.set()
    asked.close()


def test_ctrl_c_ends_a_wait_for_a_scorer() -> None:
    """In the inline fleet, where the main thread waits for the scoring thread."""
    Hangs.on.clear()
    asked = server("tests.unit.rewards.scorers.test_isolation:Hangs=1")
    main = threading.get_ident()
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            asked.score(request(rollouts=2), IMAGES[:2])
    finally:
        signal.signal(signal.SIGINT, before)
        Hangs.on.set()
    asked.close()


def test_a_hostile_reward_changes_no_figure_of_a_run(hostile: Any) -> None:
    """All that is learned and scored, bit for bit; of weight 0, so that it counts for nothing."""

    def run(*extra: str) -> list[tuple]:
        config = small_config(iterations=2, rewards={"extra": list(extra)})
        with InlineFleet(fleet_plan(config)) as fleet:
            found = fingerprint(run_training(config, fleet))
        without = [
            {name: value for name, value in row.items() if "spoils" not in name}
            for row, _, _ in found
        ]
        return [
            (row, tokens, {name: of for name, of in rewards.items() if name != "spoils"})
            for row, (_, tokens, rewards) in zip(without, found)
        ]

    plain, before = run(), snapshot()
    assert run("tests.hostile:Spoils=0") == plain
    after = snapshot()
    after["loggers"] = {name: after["loggers"][name] for name in before["loggers"]}
    for name in before.keys() - {"generators"}:  # roles draw, as they always did
        assert after[name] == before[name], name

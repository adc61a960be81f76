"""A user's own rewards by dotted path, as the documentation shows them."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ConfigError
from cluster.messages import Condition
from learner.config import merge, validate
from learner.fleet_plan import fleet_plan
from learner.run import REFUSED, main
from rewards.config import RewardsConfig
from rewards.scorers.user_rewards import load_user_reward, parse_user_reward
from tests.small_run import plain_miniature

README = Path(__file__).parents[4] / "rewards" / "README.md"


def test_path_and_weight() -> None:
    extra = parse_user_reward("my_pkg.rewards:Aesthetic=0.5")
    assert (extra.name, extra.path) == ("aesthetic", "my_pkg.rewards:Aesthetic")
    assert (extra.weight, extra.normalise, extra.limit, extra.pool) == (0.5, "group", 0, "")
    assert extra.options == {}


def test_options_of_the_term_and_of_the_constructor() -> None:
    extra = parse_user_reward(
        "a.b:LAIONScore=2,normalise=batch,limit=3,pool=gpu,name=look,size=224,v=x"
    )
    assert extra.name == "look"
    assert (extra.weight, extra.normalise, extra.limit, extra.pool) == (2, "batch", 3, "gpu")
    assert extra.options == {"size": 224, "v": "x"}


def test_without_a_weight_it_counts_once() -> None:
    assert parse_user_reward("a:TextFidelity").weight == 1
    assert parse_user_reward("a:TextFidelity").name == "text_fidelity"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Aesthetic=1", "is written module:Class=weight"),
        ("my-pkg:Aesthetic=1", "is written module:Class=weight"),
        ("a:B=much", "the weight must be a number, found 'much'"),
        ("a:B=true", "the weight must be a number"),
        ("a:B=.nan", "the weight must be a number, found '.nan'"),
        ("a:B=1,limit=nan", "the limit must be a number, found 'nan'"),
        ("a:B=-1", "'a:B=-1': weight must be >= 0, found -1"),
        ("a:B=1,normalise=z", "normalise must be one of group, batch, anchored, centred"),
        ("a:B=1,odd", "expected option=value, found 'odd'"),
        ("a:B=1,v=[1", r"the v '\[1' cannot be read as YAML \(.*expected ',' or"),
        ("a:B=1,v=@x", "the v '@x' cannot be read as YAML .*put it in quotes"),
        ("a:B=1,v=*", "cannot be read as YAML"),
        ("a:B=1,v=\0", r"the v '\\x00' cannot be read as YAML \(unacceptable character"),
        ("a:B=1,v=x\udce9", "cannot be read as YAML"),
        ("a:B=1,v=2001-13-45", "cannot be read as YAML .*month must be in"),
        ("a:B={", "the weight '{' cannot be read as YAML"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_user_reward(text)


def test_names_are_taken_once() -> None:
    for extra in (("a:Clip=1",), ("a:B=1", "c:B=1"), ("a:Loo=1,name=loo_fid",)):
        with pytest.raises(ValueError, match="name more than one reward: add name="):
            RewardsConfig(extra=extra)
    assert list(RewardsConfig(extra=("a:B=1", "c:B=1,name=d")).terms()) == [
        "clip", "hps", "b", "d", "loo_fid"
    ]  # fmt: skip


def config(**changes: object):
    return validate(merge(plain_miniature(), changes), "test")


def test_pools_and_scorers_must_know_each_other() -> None:
    with pytest.raises(ConfigError, match="hps is to run in the pool 'gpu', but reward_pools has"):
        config(rewards={"hps": {"pool": "gpu"}})
    with pytest.raises(ConfigError, match="no scorer names 'gpu' as its pool"):
        config(reward_pools={"gpu": {}})
    with pytest.raises(ConfigError, match="'server' is no name"):
        config(rewards={"hps": {"pool": "server"}}, reward_pools={"server": {}})
    with pytest.raises(ConfigError, match=r"unknown field 'reward_pools\.gpu\.num_server', did"):
        config(rewards={"hps": {"pool": "gpu"}}, reward_pools={"gpu": {"num_server": 2}})
    plan = fleet_plan(
        config(
            rewards={"hps": {"pool": "gpu"}, "features_pool": "gpu"},
            reward_pools={"gpu": {"num_servers": 2, "max_batch": 40}},
        )
    )
    main, gpu = plan.servers
    assert (gpu.name, gpu.count, gpu.depth) == ("reward-gpu", 2, 6)  # 2 x 3 groups of 16 in 40
    assert gpu.config.judge is None
    assert main.config.judge is not None
    assert [role.name for role in plan.scoring_pools("judge")] == ["reward-server"]
    assert [role.name for role in plan.scoring_pools("rewards")] == ["reward-server", "reward-gpu"]
    assert plan.feature_server("rewards") is gpu
    assert plan.feature_server("judge") is main


def test_a_disabled_scorer_is_not_there() -> None:
    assert list(config(rewards={"hps": {"enabled": False}}).rewards.terms()) == ["clip", "loo_fid"]


def test_the_documented_example_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code block of rewards/README.md, as it stands there."""
    block = re.search(r"```python\n# my_rewards\.py\n(.*?)```", README.read_text(), re.DOTALL)
    module = types.ModuleType("my_rewards")
    exec(block[1], module.__dict__)
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    command = re.search(r"--rewards\.extra (my_rewards:\S+)", README.read_text())[1]
    scorer = load_user_reward(parse_user_reward(command), "cpu")
    gray = np.full((2, 4, 4, 3), 90, np.uint8)
    vivid = gray.copy()
    vivid[1, :2] = (255, 0, 0)
    scores = scorer(vivid, [Condition(text="")] * 2)
    assert scores.shape == (2,)
    assert scores[0] == pytest.approx(0, abs=1e-6)
    assert scores[1] > 0.1


@pytest.mark.parametrize(
    ("reward", "field"),
    [("clip", "weight"), ("hps", "weight"), ("loo_fid", "weight"), ("clip", "limit")],
)
def test_every_reward_refuses_negative_weights_and_limits(reward: str, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field} must be >= 0.*found -1"):
        config(rewards={reward: {field: -1.0}})


def test_a_dry_run_tells_of_rewards_that_cannot_be_built(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for text, told in {
        "nowhere.at_all:Thing": "nowhere.at_all:Thing cannot be imported",
        "tests.stand_ins:Brightness=1,shade=3": "called with (device, shade)",
    }.items():
        assert main(["--dry-run", "--rewards.extra", text]) == REFUSED
        assert told in capsys.readouterr().out
    assert main(["--dry-run", "--rewards.extra", "tests.stand_ins:Brightness=1"]) == 0
    assert "rewards.extra:" not in capsys.readouterr().out

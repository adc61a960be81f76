from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from actors.models.llamagen import LlamaGenConfig
from actors.models.vq import VQConfig
from learner import plan
from learner.capacity.gpus import UNITS, Process, pack, processes
from learner.config import dump, load_preset, merge, to_dict, validate
from learner.plan import (
    REFUSED,
    card_of,
    largest_microbatch,
    main,
    memory_of,
    parse,
    rollouts_of,
)
from rewards.config import RewardPool
from tests.reduced import random_run
from tests.unit.learner.capacity.test_service_times import write_run

ARCHITECTURE = LlamaGenConfig(
    dim=128, num_layers=4, num_heads=2, grid=8, vocab_size=1024, num_classes=10
)  # fmt: skip


def config_of(**changes: object):
    return validate(merge(to_dict(load_preset("miniature")), changes), "test")


def test_the_largest_microbatch_is_the_last_that_fits() -> None:
    config = config_of(loss={"kl_coef": 0.1})
    limit = memory_of(config, ARCHITECTURE, 11).total
    assert largest_microbatch(config, ARCHITECTURE, limit) == 11
    assert largest_microbatch(config, ARCHITECTURE, limit - 1) == 10
    assert largest_microbatch(config, ARCHITECTURE, 1e15) == rollouts_of(config) == 160
    assert largest_microbatch(config, ARCHITECTURE, 1e3) == 0


def test_learners_share_rollouts_weights_and_optimizer() -> None:
    one, two = config_of(), config_of(num_learners=2)
    assert rollouts_of(two) == 80
    alone, shared = memory_of(one, ARCHITECTURE), memory_of(two, ARCHITECTURE)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(shared, name) == getattr(alone, name) / 2


def test_a_reference_counts_where_there_is_one() -> None:
    without = memory_of(config_of(), ARCHITECTURE)
    beside = memory_of(config_of(loss={"kl_coef": 0.1}), ARCHITECTURE)
    away = memory_of(
        config_of(loss={"kl_coef": 0.1}, learner={"reference_device": "cpu"}), ARCHITECTURE
    )
    assert (without.reference, away.reference) == (0, 0)
    assert beside.reference == beside.weights


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--preset", "miniature", "--gpu-memory-gb", "1"]) == 0
    text = capsys.readouterr().out
    assert "fits 1 GB" in text
    assert "largest learner.microbatch that does: 160" in text
    assert main(["--preset", "miniatur"]) != 0
    assert "did you mean 'miniature'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "options", "seconds_of", "size"),
    [
        ("", [], "H100", 80),
        ("NVIDIA H200", [], "NVIDIA H200", 140),
        ("Tesla T4", [], "H100", 16),
        ("Tesla T4", ["--gpu", "A100"], "A100", 80),
        ("NVIDIA H200", ["--gpu-memory-gb", "40"], "NVIDIA H200", 40),
    ],
)
def test_the_kind_of_gpu_is_named_or_found(
    device: str,
    options: list[str],
    seconds_of: str,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan, "this_gpu", lambda: (device, 140e9 if "H200" in device else 16e9))
    card = card_of(parse(options)[0])
    assert (card.name, card.memory) == (seconds_of, size * 1e9)
    told = "Tesla T4 is in no table of figures" in capsys.readouterr().out
    assert told == (device == "Tesla T4" and not options)


def test_an_unknown_kind_of_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "h1000"]) == REFUSED
    assert "did you mean 'h100'" in capsys.readouterr().err


# Every process on each GPU.

TOKENIZER = VQConfig(channels=32, multipliers=(1, 1), codebook_size=1024)


def shares(*found: float) -> list[list[float]]:
    """Shares of processes -> those on each GPU."""
    packed = pack([Process(str(at), share, 1.0) for at, share in enumerate(found)])
    return [[process.share for process in gpu.processes] for gpu in packed]


def test_processes_share_a_gpu_up_to_the_whole() -> None:
    assert shares(0.4, 0.3, 0.3) == [[0.4, 0.3, 0.3]]
    assert shares(0.1, 0.2, 0.7) == [[0.1, 0.2, 0.7]]  # in floating point, a little more than 1
    assert shares(0.5, 0.6, 0.5) == [[0.5, 0.5], [0.6]]
    assert shares(1, 0.5, 1, 0.5) == [[1], [0.5, 0.5], [1]]
    assert shares(0.3, 0.6, 0.4) == [[0.3, 0.6], [0.4]]
    assert shares(0.5, 0.7, 0.3) == [[0.5], [0.7, 0.3]]  # the fullest that has room
    assert shares(2, 0.5) == [[2], [2], [0.5]]
    assert shares(*[1 / 3] * 4) == [[1 / 3] * 3, [1 / 3]]
    assert shares() == []
    assert pack([Process("a", 0.25, 1.0)])[0].free == UNITS * 3 // 4


def test_every_worker_with_a_gpu_is_counted() -> None:
    gpu = {"num_gpus": 0.25}
    config = config_of(
        num_samplers=3,
        num_reward_servers=2,
        sampler=gpu,
        reward=gpu,
        learner={"num_gpus": 1.0},
        reward_pools={"extra": {"num_servers": 2, "num_gpus": 0.5}, "cpu": {}},
        rewards={
            "hps": {"pool": "extra"},
            "features_pool": "cpu",
            "extra": ["tests.stand_ins:Brightness=1"],
        },
    )
    found = {process.name: process for process in processes(config, ARCHITECTURE, TOKENIZER)}
    assert list(found) == [
        "learner",
        *(f"sampler-{at}" for at in range(3)),
        *(f"reward-server-{at}" for at in range(2)),
        *(f"reward-extra-{at}" for at in range(2)),
    ]
    assert found["learner"].memory > memory_of(config, ARCHITECTURE).total
    assert found["sampler-0"].memory == found["sampler-2"].memory
    assert found["reward-server-0"].unknown == ("rewards.extra brightness",)
    # the main pool has CLIP and the judge's networks, the other one HPS alone
    assert found["reward-server-0"].memory > found["reward-extra-0"].memory
    assert processes(config_of(), ARCHITECTURE, TOKENIZER) == []


def test_more_scorers_and_more_precision_take_more() -> None:
    def server(**rewards: object) -> float:
        config = config_of(reward={"num_gpus": 1}, evaluation={"num_images": 0}, rewards=rewards)
        return processes(config, ARCHITECTURE, TOKENIZER)[0].memory

    large = {"model": "ViT-L-14-quickgelu", "pretrained": "openai"}
    small = server()
    assert server(clip=large) - small == pytest.approx(1.71e9 + 0.54e9, rel=0.1)
    half = server(clip={**large, "precision": "bf16"})
    assert half - small == pytest.approx((server(clip=large) - small) / 2, rel=0.05)
    assert server(features={"network": "inception"}) > small
    assert server(clip={**large, "enabled": False}) < small


@pytest.mark.parametrize(
    "preset", ["llamagen-b-256", "llamagen-xl-384", "paper-fixed", "vqgan-imagenet"]
)
def test_presets_fit_what_they_say_without_any_file(
    preset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """taming's project file included: its published sizes are known."""
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))
    assert main(["--preset", preset, "--gpu-memory-gb", "80"]) == 0
    text = capsys.readouterr().out
    for process in ("learner", "sampler", "reward-server"):
        assert f": {process} " in text
    assert "of 80 GB" in text
    assert "not fit" not in text
    assert "estimate by arithmetic, not measured on a GPU" in text
    for phase in ("sample", "images", "score", "features", "moments", "learn", "publish", "load"):
        assert f"│ {phase} " in text
    assert main(["--preset", preset, "--gpu-memory-gb", "8"]) == 0
    text = capsys.readouterr().out
    assert "The learner does not fit" in text
    assert (
        "Does not fit (a share of a GPU is that part of its memory, 10% of it kept free): " in text
    )
    assert "--learner.checkpointing, a lower --learner.microbatch" in text
    assert "These settings do not fit: the times are what they would be." in text


def test_vqgan_imagenet_has_its_published_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))
    assert main(["--preset", "vqgan-imagenet"]) == 0
    assert "1411 M parameters, 256 tokens" in capsys.readouterr().out


def test_the_runs_options_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    preset = ["--preset", "llamagen-b-256"]
    assert main([*preset, "--num-learners", "2"]) == REFUSED  # not a traceback
    assert "2 learners need a GPU each" in capsys.readouterr().err
    assert main([*preset, "--num-learners", "2", "--learner.num-gpus", "1"]) == 0
    text = capsys.readouterr().out
    assert "3 GPUs of" in text
    assert "0: learner-0" in text
    assert "1: learner-1" in text
    assert main([*preset, "--num-samplers", "8"]) == 0
    assert "2: sampler-7" in capsys.readouterr().out


def test_a_policy_of_ones_own_is_counted_by_its_header(tmp_path: Path) -> None:
    config = random_run("llamagen-b-256", tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(dump(config))
    assert main(["--preset", str(file)]) == 0


# The plan document.


@pytest.mark.parametrize("preset", ["miniature", "llamagen-b-256", "paper-fixed", "llamagen-t2i"])
def test_the_document_is_json_that_makes_the_run(
    preset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "this_gpu", lambda: ("Tesla T4", 16e9))
    options = [
        "--num-samplers", "3", "--reward.min", "1", "--reward.max", "4", "--output.no-rollouts",
        "--loss.kl-coef", "0.5", "--evaluation.cfg-scales", "1.5", "3",
        "--sampler.labels", "tessera-role=sampler", "zone=in(a,b)",
    ]  # fmt: skip
    assert main(["--preset", preset, "--json", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 1
    assert parse(document["arguments"])[1] == parse(["--preset", preset, *options])[1]
    roles = {role["name"]: role for role in document["roles"]}
    assert list(roles) == ["learner", "moments-server", "sampler", "reward-server", "driver"]
    assert (roles["sampler"]["count"], roles["sampler"]["max"]) == (3, 3)
    assert roles["sampler"]["labels"] == {"tessera-role": "sampler", "zone": "in(a,b)"}
    server = roles["reward-server"]
    assert (server["count"], server["min"], server["max"]) == (1, 1, 4)
    for role in roles.values():
        assert role["num_cpus"] > 0
        assert 1e9 <= role["memory_bytes"] < 64e9
    on_gpus = preset != "miniature"
    assert (document["gpus"] > 0) == on_gpus == (document["iteration_s"] is not None)
    assert document["gpu"] == ("h100" if on_gpus else "")
    assert document["object_store_bytes"] > 3 * 1e6
    assert document["checkpoint_bytes"] > 1e6


def test_pools_are_roles_of_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = {"num_servers": 2, "num_gpus": 0.5, "num_cpus": 3}
    file = tmp_path / "mine.yaml"
    file.write_text(
        dump(config_of(reward_pools={"extra": pool}, rewards={"hps": {"pool": "extra"}}))
    )
    assert main(["--preset", str(file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = next(role for role in document["roles"] if role["name"] == "reward-extra")
    assert (found["count"], found["num_cpus"], found["num_gpus"]) == (2, 3, 0.5)
    assert document["arguments"] == ["--preset", str(file)]


# A cluster.


def test_pools_that_a_split_changes_are_written_into_the_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have no flags; with what is asked for, the plan is taken."""
    file, options = tmp_path / "mine.yaml", ["--gpus", "4", "--gpu", "h200"]
    preset, pools = load_preset("paper-fixed"), {"extra": RewardPool(num_gpus=0.3)}
    terms = dataclasses.replace(preset.rewards.hps, pool="extra")
    rewards = dataclasses.replace(preset.rewards, hps=terms)
    base = dataclasses.replace(preset, rewards=rewards, reward_pools=pools)
    file.write_text(dump(base))
    assert main(["--preset", str(file), *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--reward-pools" not in shown
    asked = re.search(r"In the preset, a YAML file: (reward_pools: \{extra: \{.*?\}\})", shown)
    assert asked
    assert main(["--preset", str(file), *options, "--json"]) == 2
    assert f"write {asked[1]} into the preset" in " ".join(capsys.readouterr().err.split())
    wanted = yaml.safe_load(asked[1])["reward_pools"]["extra"]
    pool = dataclasses.replace(base.reward_pools["extra"], **wanted)
    file.write_text(dump(dataclasses.replace(base, reward_pools={"extra": pool})))
    assert main(["--preset", str(file), *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    parse(document["arguments"])


def test_a_cluster_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "paper-fixed", "--gpus", "16", "--gpu", "h200"]
    assert main([*options, "--price-per-gpu-hour", "2", "--link-gbit", "100"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "Best split of 16 GPUs at max_staleness 0: ",
        "estimate by arithmetic, not measured on a GPU",
        "Bottleneck: ",
        "Staleness needed for ",
        "over links of 100 Gbit/s",
        "Object store of a node: ",
        "strong scaling, groups an iteration fixed",
        "│ 1024 │",
        "price of 1,000 iterations",
        "As a run: python -m learner.run --preset paper-fixed --num-samplers ",
    ):
        assert part in text
    assert main([*options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gpus"] <= 16
    assert document["images_per_s"] * document["iteration_s"] == pytest.approx(144)
    roles = {role["name"]: role for role in document["roles"]}
    config = parse(document["arguments"])[1]
    assert config.num_samplers == roles["sampler"]["count"] > 1
    assert config.num_reward_servers == roles["reward-server"]["count"]
    assert config.num_learners == roles["learner"]["count"]


def test_a_measured_run_predicts_others_on_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(write_run(tmp_path, 6))  # samplers of a second a group, images of a half
    options = ["--preset", "miniature", "--measured", run, "--num-samplers"]
    seconds = []
    for samplers in ("1", "2"):
        assert main([*options, samplers, "--json"]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["iteration_s"])
    assert seconds[0] > seconds[1] > 4  # learning takes as long
    assert main([*options, "2"]) == 0
    assert f"On this machine an iteration {seconds[1]:.2f} s" in capsys.readouterr().out


def test_weak_scaling_keeps_groups_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "paper-fixed", "--gpu", "h200", "--groups-per-iteration", "24"]
    assert main([*options, "--gpus", "2", "--scaling", "weak"]) == 0
    text = capsys.readouterr().out
    assert "weak scaling, groups an iteration grow" in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "4", "--gpu-memory-gb", "4"], "no split of 4 GPUs of 4 GB fits"),
        (["--gpus", "4", "--measured", "nothing-there"], "nothing-there is not there"),
        (["--gpus", "-1"], "--gpus must be from 0"),
        (["--gpus", "4", "--gpus-per-node", "0"], "--gpus-per-node must be from 1"),
        (["--link-gbit", "-5", "--gpus", "4"], "--link-gbit must be from 0"),
        (["--link-gbit", "nan", "--gpus", "4"], "--link-gbit must be from 0"),
    ],
)
def test_impossible_clusters_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--preset", "paper-fixed", "--gpu", "h200", *options]) == REFUSED
    assert message in capsys.readouterr().err

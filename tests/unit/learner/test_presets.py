"""Every preset: its header, its dry run, two iterations with random weights at reduced width."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from actors.checkpoints.sources import planned_policy, planned_tokenizer
from cluster.errors import CheckpointError
from cluster.fleet import InlineFleet
from cluster.weights import unpack_weights
from learner.capacity.budget import budget_of, changed
from learner.capacity.cards import CARDS
from learner.capacity.evaluation import evaluation_cost
from learner.capacity.workload import Models
from learner.config import RunConfig, load_preset
from learner.evaluation.held_out import base_rows, evaluate_policy, real_images
from learner.evaluation.in_run import figures_of
from learner.fleet_plan import fleet_plan
from learner.preflight import preflight
from learner.run import REFUSED, main
from rewards.networks.open_clip_sources import check_activation
from tests.reduced import SMALL, architectures, presets, random_run, values_of
from tests.small_run import run_training

NAMES = [
    "llamagen-b-256",
    "llamagen-t2i",
    "llamagen-xl-384",
    "miniature",
    "miniature-captions",
    "miniature-vqgan",
    "mnist",
    "paper-fixed",
    "paper-llamagen-l-256",
    "vqgan-imagenet",
]
SHIPPED = ("miniature", "miniature-captions", "miniature-vqgan")
ON_CPU = (*SHIPPED, "mnist")
"""Presets of small networks, which are shipped or built on demand."""
CPU = {
    "iterations": 2,
    "groups_per_iteration": 3,
    "rollouts_per_group": 4,
    "learner": {"num_gpus": 0, "num_threads": 1, "microbatch": 5},
    "sampler": {"num_gpus": 0},
    "reward": {"num_gpus": 0},
    "rewards": {"loo_fid": {"seed_images": 24}},
    "weights": {"dtype": "float32"},  # snapshots then show what the learner holds
}


OF_CLASSES = ["fid/between_classes", "fid/within_classes"]
"""Metrics that are not defined for captions."""


def test_these_are_the_presets() -> None:
    assert presets() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_headers_say_what_to_expect(name: str) -> None:
    text = Path("learner/presets", f"{name}.yaml").read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("Reproduces", "Cost", "Expected"):
        assert any(line.startswith(f"# {word} ") for line in header), word


NUMBERS = {"one": 1, "two": 2}


def models_of(config: RunConfig) -> Models:
    policy, tokenizer = config.policy, config.tokenizer
    return Models(planned_policy(policy.source()), planned_tokenizer(tokenizer.source()))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_CPU])
def test_figures_of_headers_are_the_planners(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every process fits its share of 80 GB."""
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))  # sizes as published
    config = load_preset(name)
    text = Path("learner/presets", f"{name}.yaml").read_text(encoding="utf-8")
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    found = {card: budget_of(config, models_of(config), CARDS[card]) for card in ("h100", "h200")}
    cost = re.search(
        r"Cost +(\d+) iterations of (\d+) rollouts.*not measured on a GPU: ([\d.]+) s an iteration "
        r"on (\w+) H100, ([\d.]+) on \w+ H200; (\d+) evaluations of ([\d,]+) images, (\d+) s each "
        r"while training on H100; ([\d.]+) h",
        header,
    )
    assert cost
    evaluations = evaluation_cost(config, models_of(config), CARDS["h100"])
    assert not evaluations.unknown
    assert int(cost[6]) == evaluations.count
    assert cost[7] == f"{config.evaluation.num_images:,}"
    assert cost[8] == f"{evaluations.each:.0f}"
    images = config.groups_per_iteration * config.rollouts_per_group
    assert [int(each) for each in cost.groups()[:2]] == [config.iterations, images]
    assert cost[3] == f"{found['h100'].seconds:.1f}"
    assert cost[5] == f"{found['h200'].seconds:.1f}"
    whole = config.iterations * found["h100"].seconds + evaluations.total
    assert cost[9] == f"{whole / 3600:.1f}"
    assert evaluations.total < whole / 2
    assert NUMBERS[cost[4]] == len(found["h100"].gpus)
    assert found["h100"].fits
    for gpu in found["h100"].gpus:
        for process in gpu.processes:
            size, share = process.memory / 1e9, min(process.share, 1) * 80
            assert f"{process.name} {size:.1f} of {share:g}" in header


def test_the_smallest_fits_24_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its header says."""
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))
    less = {"learner.microbatch": 32, "sampler.max_groups": 8}
    config = changed(load_preset("llamagen-b-256"), less)
    assert budget_of(config, models_of(config), CARDS["4090"]).fits


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_CPU])
def test_presets_for_gpus_are_fast(name: str) -> None:
    config = load_preset(name)
    assert config.sampler.max_groups > 1
    assert config.sampler.dtype == config.sampler.image_dtype == "bfloat16"
    assert {scorer.precision for scorer in (config.rewards.clip, config.rewards.hps)} == {"bf16"}
    assert not config.learner.checkpointing
    rollouts = config.groups_per_iteration * config.rollouts_per_group
    passes = -(-rollouts // config.learner.microbatch)
    assert passes * config.learner.microbatch - rollouts < passes  # even ones


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a machine without GPU, weights or references: says what it lacks, and that the run could
    not start; that this machine is too small does not count."""
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    status = main(["--preset", name, "--dry-run"])
    assert status == (0 if name in SHIPPED else REFUSED)
    text, told = capsys.readouterr()
    assert ("the run cannot start" in told) == bool(status)  # and last
    assert yaml.safe_load(text)["iterations"] == values_of(name)["iterations"]
    assert text.startswith("# ") == bool(status)  # problems first
    if name == "mnist":
        assert "build them, `python -m learner.miniature.build --system mnist`" in told
        assert told.count("\n") == 2  # one problem for all networks
    elif name not in ON_CPU:
        assert "does not fit here: the fleet asks for" in text
        assert f"python -m actors.weights fetch {values_of(name)['policy']['checkpoint']}" in text
        assert "rewards.loo_fid.reference: expected" in text
        assert re.search(
            r"evaluation\.images: (expected imagenet256 at|captions-images: no such)", text
        )
        for network in ("judge.clip", "judge.features", "judge.second"):
            assert f"  {network}: " in text, network  # downloads
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_two_iterations_at_reduced_width(name: str, tmp_path: Path) -> None:
    config = random_run(name, tmp_path, changes=CPU)
    with InlineFleet(fleet_plan(config)) as fleet:
        before = unpack_weights(fleet.learner.snapshot())
        done = run_training(config, fleet)
        after = unpack_weights(fleet.learner.snapshot())
    assert [iteration.metrics["version"] for iteration in done] == [1, 2]
    for iteration in done:
        assert all(math.isfinite(value) for value in iteration.metrics.values())
        measured = [name for name in OF_CLASSES if name in iteration.metrics]
        assert measured == ([] if config.conditions.captions else OF_CLASSES)
        assert iteration.metrics["images/failed"] == 0
        check_ratio(config, iteration.metrics)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.8 * len(before)


@pytest.mark.parametrize("name", ["llamagen-b-256", "llamagen-t2i", "vqgan-imagenet"])
def test_evaluations_at_reduced_width(name: str, tmp_path: Path) -> None:
    """Of classes with guidance scales, and of captions, which have no classes: the figures of a
    preset's judge, the same again."""
    changes = {**CPU, "evaluation": {"num_images": 8, "neighbours": 2}}
    if name != "llamagen-t2i":
        changes["conditions"] = {"classes": [0, 3, 7, 9]}
    config = random_run(name, tmp_path, changes=changes)
    rows = [row.name for row in base_rows(config)]
    assert rows == {"llamagen-b-256": ["base", "base, CFG 1.5", "base, CFG 2"]}.get(name, ["base"])
    with InlineFleet(fleet_plan(config)) as fleet:
        fleet.broadcast(0)
        real = real_images(config, fleet)
        spec = base_rows(config)[-1].spec
        found = [evaluate_policy(config, fleet, spec, real) for _ in range(2)]
    assert found[0] == found[1]
    captions = name == "llamagen-t2i"
    assert found[0]["images"] == (9 if captions else 8)  # three captions, equally many of each
    assert ("accuracy" in found[0]) == (not captions)
    for figure in figures_of(config.judge):
        assert math.isfinite(found[0][figure]), figure


def test_a_policy_that_cannot_be_guided_has_no_guided_rows(
    tmp_path: Path,
) -> None:
    config = random_run("vqgan-imagenet", tmp_path, changes=CPU)
    assert not preflight(config).problems
    guided = changed(config, {"evaluation.cfg_scales": [1.5, 2.0]})
    (problem,) = preflight(guided).problems
    assert problem.startswith("evaluation.cfg_scales: expected none, since")
    assert problem.endswith("cfg_scales: []")
    without = changed(guided, {"evaluation.num_images": 0})
    assert not preflight(without).problems
    assert "evaluation.every and output.keep_best do nothing" in "".join(preflight(without).notes)


def check_ratio(config: RunConfig, row: dict[str, float]) -> None:
    """Learner and sampler agree before the update, as far as their precisions let them."""
    exact = config.learner.precision == "fp32" and config.sampler.dtype == "float32"
    bound = 1e-4 if exact else 0.5
    if config.sampling.guidance == "distil":
        assert row["policy/logprob_gap"] > bound  # not the policy that was sampled
    else:
        assert row["policy/logprob_gap"] < bound


@pytest.mark.parametrize("name", NAMES)
def test_the_reduced_policy_is_of_the_presets_family(name: str) -> None:
    values = values_of(name)
    policy, tokenizer = architectures(values, SMALL)
    assert type(policy).__name__.startswith("Taming") == ("vqgan" in name)
    assert tokenizer.codebook_size == policy.vocab_size
    assert bool(getattr(policy, "caption_dim", 0)) == (
        name in ("llamagen-t2i", "miniature-captions")
    )


@pytest.mark.parametrize("name", NAMES)
def test_published_clip_weights_have_the_activation_they_were_trained_with(name: str) -> None:
    clip = load_preset(name).rewards.clip
    if clip.pretrained:
        check_activation(clip.model, clip.pretrained)
        with pytest.raises(CheckpointError, match="trained with another activation"):
            check_activation(clip.model.removesuffix("-quickgelu"), clip.pretrained)


def test_the_papers_settings_are_the_public_codes() -> None:
    """Facts of the code, one by one (learner/presets/paper-llamagen-l-256.yaml)."""
    config = load_preset("paper-llamagen-l-256")
    assert (config.iterations, config.groups_per_iteration, config.rollouts_per_group) == (
        600, 12, 12
    )  # fmt: skip
    assert (config.sampling.cfg_scale, config.sampling.temperature) == (1.5, 1)
    assert (config.sampling.top_k, config.sampling.top_p) == (0, 1)
    learner = config.learner
    assert (learner.lr, learner.betas, learner.weight_decay) == (1e-5, (0.9, 0.95), 0.01)
    assert (learner.max_grad_norm, learner.updates_per_iteration) == (1, 2)
    assert learner.lr_at(599, 600) == learner.lr_at(0, 600) == 1e-5
    loss = config.loss
    assert (loss.clip_low, loss.clip_high) == (0.2, 0.2)
    assert (loss.kl_coef, loss.kl_estimator, loss.kl_level) == (3.0, "k3", "sequence")
    assert config.rewards.loo_fid.decay == 0.5


def test_a_dry_run_still_refuses_a_policy_of_ones_own_that_is_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--dry-run", "--policy.checkpoint", "nowhere.safetensors"]) == REFUSED
    assert "nowhere.safetensors: no such file" in capsys.readouterr().out

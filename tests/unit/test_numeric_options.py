"""Numbers that reach the draw or the loss: bounds of options, logits that are not finite."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from actors import sample
from actors.decoding.decode import decode_tokens
from actors.decoding.steps import Workspace
from actors.distribution import sample_tokens
from actors.sample_source import run_source
from cluster.errors import ConfigError, NotFiniteError
from cluster.messages import Condition, SamplingSpec
from learner.config import RunConfig, validate
from learner.grpo.entropy import EntropyConfig, PaperEntropy
from learner.grpo.loss import LossConfig
from learner.preflight import notes
from learner.training.optimizer import OptimizerConfig
from learner.training.real_tokens import RealTokensConfig
from rewards.combine import RewardTerm
from rewards.config import LooFidTerm
from tests.unit.helpers import SPECS, TINY, tiny_policy

WRONG: list[tuple[str, Any]] = [
    ("temperature", 1e-40),
    ("temperature", 1e-6),
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", 1e38),
    ("temperature", math.inf),
    ("temperature", math.nan),
    ("cfg_scale", 1e38),
    ("cfg_scale", 101.0),
    ("cfg_scale", -1.0),
    ("cfg_scale", math.inf),
    ("cfg_scale", math.nan),
    ("top_k", -1),
    ("top_k", 10**12),
    ("top_k", 10**400),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", -0.1),
    ("top_p", math.nan),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda part: str(part)[:8])
def test_a_spec_has_bounds_wherever_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    guidance = {"guidance": "guided"} if name == "cfg_scale" else {}
    with pytest.raises(ValueError, match=name):
        SamplingSpec(**{name: value, **guidance})
    with pytest.raises(ConfigError, match=f"sampling.*{name}|{name}"):
        validate({"sampling": {name: value, **guidance}}, "here")
    if value != 10**400:  # no number of a command line or YAML is that long
        option = f"--{name.replace('_', '-')}={value}"
        assert sample.main(["--classes", "0", "--out", str(tmp_path / "out"), option]) == 2
        assert name.replace("_", "-") in capsys.readouterr().err.replace("_", "-")
        assert not (tmp_path / "out").exists()
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"sampling": {name: value}}))
        with pytest.raises(ConfigError, match=name):
            run_source(tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("temperature: 1e-3", "temperature must be a number, found '1e-3'"),  # text, to YAML
        ("top_k: yes", "top_k must be a number, found True"),
        ("top_k: 2.5", "top_k must be a whole number, found 2.5"),
        ("top_p: [1]", "top_p must be a number"),
        ("guidance: 1", "guidance must be text, found 1"),
    ],
)
def test_a_runs_spec_of_other_types_is_refused(tmp_path: Path, section: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(f"sampling: {{{section}}}")
    with pytest.raises(ConfigError, match=message):
        run_source(tmp_path)


@pytest.mark.parametrize("scales", [[1e38], [2.0, math.inf], [101.0], [0.5]])
def test_scales_of_the_evaluation_have_bounds(scales: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.cfg_scales"):
        validate({"evaluation": {"cfg_scales": scales}}, "here")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38, -1.0])
@pytest.mark.parametrize(
    ("kind", "section", "names"),
    [
        (LossConfig, "loss", ("clip_high", "kl_coef", "mask_high", "mask_low")),
        (EntropyConfig, "entropy", ("coef", "gain", "max_coef", "damping", "target")),
        (PaperEntropy, "entropy.paper", ("coef", "max_coef", "dead_zone", "sharpness")),
        (OptimizerConfig, "learner", ("lr", "max_grad_norm", "weight_decay")),
        (RealTokensConfig, "real", ("weight",)),
        (RewardTerm, "rewards.clip", ("weight", "limit")),
        (LooFidTerm, "rewards.loo_fid", ("weight", "limit", "joint_weight", "decay", "window")),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_reaches_the_loss_has_bounds(
    kind: type, section: str, names: tuple[str, ...], value: float
) -> None:
    for name in names:
        if name == "window" and value == 1e38:
            continue  # a long one
        if name != "lr" or value == -1.0:  # the configuration's to refuse
            with pytest.raises(ValueError, match=name):
                kind(**{name: value})
        nested: dict[str, Any] = {name: value}
        for part in reversed(section.split(".")):
            nested = {part: nested}
        with pytest.raises(ConfigError, match=name):
            validate(nested, "here")


def test_the_bounds_of_a_spec_can_be_drawn_from() -> None:
    policy, draws = tiny_policy(), torch.rand(4, TINY.num_tokens, dtype=torch.float64)
    given = policy.encode([Condition(text="", class_index=row) for row in range(4)])
    for spec in (
        SamplingSpec(temperature=1e-5),
        SamplingSpec(temperature=1e3),
        SamplingSpec(cfg_scale=100, guidance="guided", temperature=1e-5),
        SamplingSpec(cfg_scale=0, guidance="guided"),
        SamplingSpec(top_k=1 << 20),
        SamplingSpec(top_p=1e-300),
    ):
        decoded = decode_tokens(policy, given, draws, spec)
        assert decoded.logprobs.isfinite().all(), spec


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("name", SPECS)
def test_logits_that_are_not_finite_are_named_at_the_draw(name: str, static: bool) -> None:
    """No index out of bounds, which is a device assert on a GPU."""
    for value in (math.nan, math.inf, -math.inf):
        policy = tiny_policy()
        policy.output.weight.data[3] = value
        given = policy.encode([Condition(text="", class_index=row) for row in range(4)])
        draws = torch.rand(4, TINY.num_tokens, dtype=torch.float64)
        with pytest.raises(NotFiniteError, match=r"logits are not finite: 4 of 4 rollouts, first"):
            decode_tokens(policy, given, draws, SPECS[name], Workspace(policy, static=static))


def test_the_error_names_what_may_be_the_cause() -> None:
    policy = tiny_policy()
    policy.tok_embeddings.weight.data[:] = math.nan  # the first token is still drawn
    spec = SamplingSpec(temperature=0.5, cfg_scale=3, guidance="guided")
    given = policy.encode([Condition(text="", class_index=0)])
    draws = torch.rand(1, TINY.num_tokens, dtype=torch.float64)
    with pytest.raises(NotFiniteError) as caught:
        decode_tokens(policy, given, draws, spec)
    for part in ("first at token 2 of 9", "diverged", "guidance scale 3", "temperature 0.5"):
        assert part in str(caught.value)
    assert "bfloat16" not in str(caught.value)


def test_tokens_of_any_row_are_in_the_vocabulary() -> None:
    rows = torch.randn(5, 7).log_softmax(-1)
    rows[0] = math.nan
    rows[1, 3] = math.nan
    rows[2] = -math.inf
    for place in (0.0, 0.5, 1 - 2**-53):
        tokens = sample_tokens(rows, torch.full((5,), place, dtype=torch.float64))
        assert ((tokens >= 0) & (tokens < 7)).all()


def test_what_a_scale_below_one_means_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for scale, said in ((0, "the unconditional policy, which LlamaGen"), (0.5, "draws between")):
        spec = SamplingSpec(cfg_scale=scale, guidance="guided")
        assert said in spec.guidance_note
        config = dataclasses.replace(RunConfig(), sampling=spec)
        assert any(said in note for note in notes(config))
        out = str(tmp_path / f"out {scale}")
        options = ["--classes", "0", "--per-condition", "1", "--out", out, "--no-png"]
        assert sample.main([*options, "--cfg-scale", str(scale)]) in (0, 2)
    for scale in (1, 1.5, 7.5):
        guidance = "none" if scale == 1 else "guided"
        assert SamplingSpec(cfg_scale=scale, guidance=guidance).guidance_note == ""


@pytest.mark.parametrize("command", ["actors.sample", "learner.run"])
def test_the_help_says_what_a_scale_below_one_means(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(command).main
    with pytest.raises(SystemExit):
        main(["--help-all"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "the unconditional policy, between them a mixture" in shown.replace("│ ", "").replace(
        " │", ""
    )

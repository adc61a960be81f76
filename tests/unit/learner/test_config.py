from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.errors import ConfigError
from learner.checkpoints.resume import check_resume
from learner.config import (
    RunConfig,
    dump,
    load_file,
    load_preset,
    to_dict,
    validate,
)
from learner.run import parse


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iteratons": 3}, "unknown field 'iteratons', did you mean 'iterations'?"),
        ({"rewards": {"clip": {"wieght": 1}}}, "'rewards.clip.wieght', did you mean 'weight'?"),
        ({"learner": {"zzz": 1}}, "unknown field 'learner.zzz': there are num_cpus,"),
        ({"num_samplers": 0}, "num_samplers should be greater than or equal to 1, found 0"),
        ({"learner": {"lr": "fast"}}, "learner.lr should be a valid number"),
        ({"learner": {"lr": -1.0}}, "learner lr and max_grad_norm must be > 0"),
        ({"sampling": {"top_p": 2.0}}, r"sampling top_p must be in (0, 1], found 2.0"),
        ({"entropy": {"controller": "tarket"}}, "'fixed', 'target' or 'paper', found 'tarket'"),
        ({"rewards": {"loo_fid": {"decay": 1.0}}}, "decay must be in [0, 1), found 1.0"),
        ({"rewards": {"loo_fid": {"seed_images": 8}}}, "at least 32 (two groups), found 8"),
        ({"learner": {"lr": float("nan")}}, "learner.lr should be a finite number"),
        ({"loss": {"kl_coef": float("inf")}}, "loss.kl_coef should be a finite number"),
        ({"num_learners": 2, "learner": {"num_gpus": 0.5}}, "2 learners need a GPU each"),
        ({"learner": {"betas": (0.9, 2.0)}}, "betas must be in [0, 1)"),
        ({"evaluation": {"cfg_scales": [0.5]}}, "cfg_scales.0 should be greater than 1"),
        ({"judge": {"further": {"second": {}}}}, "judge.further: expected names"),
        ({"judge": {"further": {"a/b": {}}}}, "of letters, digits and _, other than features"),
        ({"judge": {"further": {"a": {"netwrk": "clip"}}}}, "did you mean 'network'?"),
        ({"reward_pools": {"a": {"num_servrs": 2}}}, "did you mean 'num_servers'?"),
        ({"output": {"keep_best": "clip/fid"}, "evaluation": {"every": 5}}, "found 'clip/fid'"),
    ],
)
def test_wrong_values_are_explained(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(values, "test.yaml")
    assert str(error.value).startswith("test.yaml: ")
    assert message in str(error.value)


def test_every_mistake_is_listed() -> None:
    with pytest.raises(ConfigError, match=r"iterations.*;.*seed"):
        validate({"iterations": 0, "seed": -1}, "test")


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_preset("miniature")
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load_file(file) == config
    assert validate(to_dict(config), "test") == config


def test_presets_by_name_and_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"iterations": 7}))
    assert load_preset(str(file)) == RunConfig(iterations=7)
    with pytest.raises(ConfigError, match=r"no preset 'minature': did you mean 'miniature'\?"):
        load_preset("minature")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foo.yaml", "--preset foo.yaml: there is no such file (looked at {here}/foo.yaml)"),
        ("mien.yaml", "did you mean 'mine.yaml'?"),
        ("sub/foo.yml", "there is no such file (looked at {here}/sub/foo.yml)"),
        ("~/no/such.yaml", "no such file"),
        ("paper-fixed.yaml", "did you mean 'paper-fixed'?"),
        ("folder", "--preset folder is a directory: name a YAML file in it"),
        ("vqgan", "did you mean 'vqgan-imagenet'?"),
        ("LlamaGen_B_256", "did you mean 'llamagen-b-256'?"),
        ("zzz", "no preset 'zzz': there are llamagen-b-256,"),
        ("", "no preset ''"),
    ],
)
def test_a_preset_that_is_not_there_is_named(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.yaml").write_text("iterations: 7\n")
    with pytest.raises(ConfigError) as error:
        load_preset(name)
    assert message.format(here=tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("", "must be a mapping of fields, found NoneType"),
        ("- 1", "must be a mapping of fields, found list"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_file(file)
    assert "bad.yaml" in str(error.value)


def test_command_line_over_preset_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"iterations": 7, "learner": {"lr": 0.5}}))
    command, config, target = parse(
        ["--preset", str(file), "--learner.lr", "0.25", "--num-samplers", "8", "--inline"]
    )
    assert (command.inline, target.saved) == (True, None)
    assert (config.iterations, config.learner.lr, config.num_samplers) == (7, 0.25, 8)
    assert config.seed == RunConfig().seed


def test_command_line_values_are_validated() -> None:
    with pytest.raises(ConfigError, match="num_samplers should be greater than or equal to 1"):
        parse(["--num-samplers", "0"])


def test_unknown_options_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--num-sampler", "3"])
    assert stop.value.code == 2
    assert "--num-samplers" in capsys.readouterr().err


def test_help_names_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = (
        "--num-samplers --num-reward-servers --iterations --seed --run-dir --resume --preset "
        "--dry-run --inline --rewards.clip.weight"
    )
    assert [option for option in options.split() if option not in text] == []


def test_batches_may_shrink_below_the_microbatch() -> None:
    _, config, _ = parse(["--rollouts-per-group", "4", "--groups-per-iteration", "2"])
    assert config.learner.microbatch > config.rollouts_per_group * config.groups_per_iteration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollouts-per-group", "1"], "greater than or equal to 2, found 1"),
        (["--learner.lr", "inf"], "learner.lr should be a finite number"),
        (["--rewards.loo-fid.seed-images", "0"], "seed_images must be at least 32"),
    ],
)
def test_impossible_values_on_the_command_line_are_one_line(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"command line: .*{message}"):
        parse(arguments)


def test_resume_may_change_how_a_run_is_carried_out_but_not_what_it_computes() -> None:
    saved = load_preset("miniature")

    def changed(**changes: object) -> RunConfig:
        return validate({**to_dict(saved), **changes}, "test")

    told = {"every": 5, "patience": 2, "hacking": "off", "diversity": "stop", "max_fid_rise": 0.5}
    check_resume(saved, changed(evaluation=told, output={"keep_best": "fid"}))
    for name, value in {"num_images": 7, "neighbours": 2, "images": "", "image_size": 9}.items():
        with pytest.raises(ConfigError, match=f"cannot change evaluation.{name}"):
            check_resume(saved, changed(evaluation={name: value}))
    check_resume(saved, changed(num_samplers=7, iterations=500, output={"checkpoint_every": 3}))
    old = {**to_dict(saved)["rewards"]["loo_fid"], "rebuild_every": 8, "num_threads": 2}
    check_resume(changed(rewards={**to_dict(saved)["rewards"], "loo_fid": old}), saved)
    rewards = to_dict(saved)["rewards"]
    told = changed(rewards={**rewards, "clip": {**rewards["clip"], "tag": "openai"}})
    check_resume(saved, told)
    with pytest.raises(ConfigError, match=r"cannot change rewards.clip.tag \(openai in the run"):
        check_resume(told, saved)
    with pytest.raises(ConfigError, match=r"cannot change seed \(0 in the run, 5 now\)"):
        check_resume(saved, changed(seed=5))
    judged = changed(judge={"further": {"clip": {"network": "pixels"}}})
    assert judged.judge.spaces()["clip"].network == "pixels"
    for one, other in ((saved, judged), (judged, saved)):
        with pytest.raises(ConfigError, match=r"cannot change judge\.further\.clip\.network"):
            check_resume(one, other)
    learner = {**to_dict(saved)["learner"], "lr": 0.5, "num_threads": 9}
    with pytest.raises(ConfigError, match=r"cannot change learner\.lr \(0\.00024 in the run"):
        check_resume(saved, changed(learner=learner))

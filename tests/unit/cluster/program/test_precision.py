"""float32 is float32 in every process that computes, and no thread changes it for another."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from actors import sample
from actors.captions import CaptionsConfig, encode_file
from actors.sample_source import SampleConfig
from cluster.messages import Condition
from cluster.program.precision import exact_fp32, fp32_flags
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from learner.miniature.build import BuildConfig, Builder
from rewards.config import RewardServerConfig
from rewards.networks.extractor import NetworkFeatures
from rewards.networks.features import FeaturesConfig, load_features
from rewards.scorers.user_rewards import load_user_reward, parse_user_reward
from rewards.servers.reward_server import RewardServer

ROOT = Path(__file__).parents[4]
EXACT = {"products": "ieee", "convolutions": "ieee", "recurrences": "ieee"}


def flags() -> dict[str, str]:
    return {name: place.fp32_precision for name, place in fp32_flags().items()}


@pytest.fixture(autouse=True)
def as_torch_starts() -> Iterator[None]:
    """TF32 for convolutions, and for products as if a library had asked for it; put back after."""
    exact_fp32()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    yield
    exact_fp32()


def test_no_product_and_no_convolution_is_tf32() -> None:
    assert set(flags().values()) != {"ieee"}
    exact_fp32()
    assert flags() == EXACT
    # both of torch's interfaces agree, or it refuses to tell
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_from_whatever_a_library_left() -> None:
    for name, place in fp32_flags().items():
        place.fp32_precision = "tf32"
        exact_fp32()
        assert flags() == EXACT, name
    torch.set_float32_matmul_precision("medium")
    exact_fp32()
    assert flags() == EXACT


class Records(nn.Module):
    """Notes the flags under which it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, ...]] = set()

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen.add(tuple(flags().values()))
        return pixels.mean((2, 3))


def test_a_thread_that_scores_while_others_load_and_score_sees_constant_flags() -> None:
    exact_fp32()
    network = Records()

    def prepare(images: np.ndarray) -> Tensor:
        return torch.zeros(len(images), 3, 4, 4)

    extract = NetworkFeatures(network, network, prepare, "records")
    ended = threading.Event()

    def score() -> None:
        while not ended.wait(0.002):
            extract(np.zeros((2, 8, 8, 3), np.uint8))

    threads = [threading.Thread(target=score) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        server = RewardServer(RewardServerConfig())
        model = "package://learner.miniature/networks/clip"
        for precision in ("fp32", "bf16"):
            config = FeaturesConfig(network="clip", model=model, precision=precision)  # type: ignore[arg-type]
            load_features(config)(np.zeros((2, 8, 8, 3), np.uint8))
        server.features(np.zeros((2, 8, 8, 3), np.uint8), "rewards")
        server.close()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert network.seen == {("ieee",) * 3}


def test_foreign_code_gets_flags_of_its_own_and_leaves_ours() -> None:
    """tests.hostile sets the old switches at import, when built and at each call."""
    exact_fp32()
    extra = load_user_reward(parse_user_reward("tests.hostile:Spoils=1"), "cpu")
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for _ in range(2):
        extra(images.copy(), [Condition(text="a"), Condition(text="b")])
        assert flags() == EXACT
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("role", ["reward_server", "sampler", "learner"])
def test_every_role_starts_so(role: str) -> None:
    """The default run's roles, built as the fleets build them."""
    made = getattr(fleet_plan(RunConfig()), role)
    made.factory(made.config, name="it")
    assert flags() == EXACT


class ReachedError(Exception):
    """Stands for the computation that would follow."""


def reached(*args: object, **options: object) -> None:
    assert flags() == EXACT
    raise ReachedError


@pytest.mark.parametrize(
    ("place", "run"),
    [
        (
            "actors.sample.load_policy",
            lambda out: sample.prepare(SampleConfig(out=out / "samples", classes="0")),
        ),
        (
            "actors.captions.CaptionEncoder",
            lambda out: encode_file(
                CaptionsConfig(captions=out / "texts.txt", features=out / "f.parquet")
            ),
        ),
        ("rewards.networks.features.load_convnet", lambda out: load_features(FeaturesConfig())),
        (
            "learner.miniature.training.train_tokenizer",
            lambda out: Builder(BuildConfig(out=out), Progress()).build(),
        ),
    ],
)
def test_every_command_that_computes_starts_so(
    place: str, run: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first model: sampling, captions, references (features), the miniature's build. All
    others compute in roles."""
    (tmp_path / "texts.txt").write_text("a three\n")
    monkeypatch.setattr(place, reached)
    with pytest.raises(ReachedError):
        run(tmp_path)


def test_nothing_else_sets_them() -> None:
    """But `isolation`, which puts back what foreign code set, around its calls."""
    names = {"fp32_precision", "allow_tf32"}
    found = set()
    for package in ("actors", "cluster", "learner", "rewards"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                targets = node.targets if isinstance(node, ast.Assign) else []
                if any(isinstance(t, ast.Attribute) and t.attr in names for t in targets):
                    found.add(file.relative_to(ROOT).as_posix())
                if isinstance(node, ast.Attribute) and node.attr == "set_float32_matmul_precision":
                    found.add(file.relative_to(ROOT).as_posix())
    assert found == {"cluster/program/precision.py", "rewards/scorers/isolation.py"}

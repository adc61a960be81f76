"""Several learners are one: gradients, steps, statistics and checkpoints, over gloo."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from cluster.errors import FleetError
from learner.learner import Learner, OptimizerConfig
from learner.loss import LossConfig
from learner.optimizer import owners
from learner.parallel import Peers, join
from learner.real_tokens import RealTokensConfig
from tests.unit.learner_cases import batch_of, gradient, make, tiny_policy_file, weights
from tests.unit.test_learner_options import off_policy
from tests.unit.test_real_tokens import CLASSES, TOKENS

STEPS = 5
MASKED = LossConfig(ratio_to="proximal", mask_low=0.6, mask_high=1.8)
WEIGHTED = LossConfig(aggregation="sequence-ratio", ratio_to="proximal", importance_cap=1.1)
CASES = {
    "plain": {"rows": 8},
    "uneven": {"rows": 7},
    "fewer rollouts than learners": {"rows": 1},
    "masked": {"rows": 6, "loss": MASKED, "stale": True},
    "weighted": {"rows": 5, "loss": WEIGHTED, "stale": True},
    "kl reward": {"rows": 5, "loss": LossConfig(kl_coef=0.5, kl_in="reward")},
    "two updates of two parts": {"rows": 7, "updates": 2, "parts": 2},
    "real": {"rows": 5, "real": 0.3},
}


def learner_of(folder: Path, case: dict, microbatch: int = 8) -> Learner:
    options = OptimizerConfig(
        lr=1e-5,
        microbatch=microbatch,
        updates_per_iteration=case.get("updates", 1),
        minibatches=case.get("parts", 1),
        max_grad_norm=0.05,  # so that it binds
    )
    real = RealTokensConfig(weight=case.get("real", 0.0), source=str(folder / "real.npz"), batch=5)
    changes = {"loss": case["loss"]} if "loss" in case else {}
    return make(str(folder / "policy.safetensors"), optimizer=options, real=real, **changes)


def train(learner: Learner, case: dict) -> list[dict[str, float]]:
    """Five steps on what the learner itself draws; stale, if its logprobs say otherwise."""
    draw = off_policy if case.get("stale") else batch_of
    return [learner.step(draw(learner, at, case["rows"])).metrics for at in range(STEPS)]


def member(rank: int, size: int, addresses: list[str], folder: Path) -> None:
    """One learner of a group, in a process of its own."""
    torch.set_num_threads(1)
    results: dict = {}
    peers: Peers | None = None
    for name, case in CASES.items():
        learner = learner_of(folder, case)
        if peers is None:  # a process joins one group, for all cases
            learner.join(rank, size, addresses[0])
            peers = learner._peers
        else:
            learner._take_place(peers)
        results[name] = {"metrics": train(learner, case)}
        torch.save(weights(learner), folder / f"{size}-{rank}-{name}.pt")
        (folder / f"saved-{size}-{name}").mkdir(exist_ok=True)
        learner.save(folder / f"saved-{size}-{name}")
    learner = learner_of(folder, CASES["plain"])
    learner._take_place(peers)
    learner._passes.prepare(off_policy(learner), proximal=True)
    learner._optimizer.zero_grad()
    prepared, _ = learner._passes.prepare(off_policy(learner), proximal=False)
    learner._accumulate(prepared, 8)
    results["norm"] = learner._optimizer.reduce()
    named = learner._optimizer._named.items()
    mine = {name: p.grad for name, p in named if p.grad is not None}
    torch.save(mine, folder / f"{size}-{rank}-gradient.pt")
    results["state"] = sum(len(state) for state in learner._optimizer._adamw.state.values())
    learner.restore(folder / "saved-1-plain")
    train_on = [learner.step(batch_of(learner, STEPS, 8)).metrics]
    results["resumed"] = train_on
    torch.save(weights(learner), folder / f"{size}-{rank}-resumed.pt")
    owned = sum(p.numel() for p in learner._optimizer._adamw.param_groups[0]["params"])
    results["owned"] = owned
    (folder / f"{size}-{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()  # nobody leaves while another still reads from it
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one learner, and of groups of two and three, on the same cases."""
    import numpy as np

    folder = tmp_path_factory.mktemp("groups")
    tiny_policy_file(folder)
    np.savez(folder / "real.npz", tokens=TOKENS, classes=CLASSES)
    for name, case in CASES.items():
        learner = learner_of(folder, case)
        (folder / f"1-0-{name}.json").write_text(json.dumps(train(learner, case)))
        torch.save(weights(learner), folder / f"1-0-{name}.pt")
        (folder / f"saved-1-{name}").mkdir()
        learner.save(folder / f"saved-1-{name}")
    for size in (2, 3):
        store = torch.distributed.TCPStore(
            "127.0.0.1", 0, size, is_master=True, wait_for_workers=False
        )
        torch.multiprocessing.spawn(
            member, (size, [f"127.0.0.1:{store.port}"], folder), nprocs=size
        )
    return folder


def of(folder: Path, size: int, rank: int = 0) -> dict:
    return json.loads((folder / f"{size}-{rank}.json").read_text())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_group_is_one_learner_over_five_steps(folder: Path, size: int, name: str) -> None:
    expected = torch.load(folder / f"1-0-{name}.pt", weights_only=True)
    start = weights(learner_of(folder, CASES["plain"]))
    assert (expected - start).abs().max() > 1e-5  # it did learn
    for rank in range(size):
        found = torch.load(folder / f"{size}-{rank}-{name}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    alone = json.loads((folder / f"1-0-{name}.json").read_text())
    for rank in range(size):
        for theirs, ours in zip(of(folder, size, rank)[name]["metrics"], alone):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6), rank


@pytest.mark.parametrize("size", [2, 3])
def test_every_learner_of_a_group_has_the_same_weights(folder: Path, size: int) -> None:
    for name in CASES:
        copies = [
            torch.load(folder / f"{size}-{rank}-{name}.pt", weights_only=True)
            for rank in range(size)
        ]
        assert all(torch.equal(copy, copies[0]) for copy in copies[1:])


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradient_is_the_sum_of_the_parts(folder: Path, size: int) -> None:
    """Averaged by rollouts, not over learners; each parameter's at its owner, limited by the norm
    of the whole."""
    learner = learner_of(folder, CASES["plain"])
    expected = gradient(learner, off_policy(learner))
    norm = expected.norm().item()
    assert norm > 0.05
    assert of(folder, size)["norm"] == pytest.approx(norm, rel=1e-5)
    found: dict = {}
    for rank in range(size):
        part = torch.load(folder / f"{size}-{rank}-gradient.pt", weights_only=True)
        assert not found.keys() & part.keys()
        found |= part
    together = torch.cat([found[name].flatten() for name in learner._optimizer._named])
    torch.testing.assert_close(together, expected * 0.05 / norm, rtol=0, atol=1e-6)


def test_gradients_of_one_learner_and_of_accumulation_are_equal(folder: Path) -> None:
    whole = learner_of(folder, CASES["plain"], microbatch=8)
    single = learner_of(folder, CASES["plain"], microbatch=1)
    batch = batch_of(whole, rows=8)
    torch.testing.assert_close(gradient(single, batch), gradient(whole, batch), rtol=0, atol=1e-6)
    for iteration in range(STEPS):
        batch = batch_of(whole, iteration)
        whole.step(batch)
        single.step(batch)
    torch.testing.assert_close(weights(single), weights(whole), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_the_optimizer_state_is_divided(folder: Path, size: int) -> None:
    total = sum(p.numel() for p in learner_of(folder, CASES["plain"])._optimizer._named.values())
    owned = [of(folder, size, rank)["owned"] for rank in range(size)]
    assert sum(owned) == total
    assert max(owned) < 1.3 * total / size


@pytest.mark.parametrize("size", [2, 3])
def test_checkpoints_do_not_depend_on_the_number_of_learners(folder: Path, size: int) -> None:
    """Of one, read by a group; and of a group, read by one."""
    alone = learner_of(folder, CASES["plain"])
    alone.restore(folder / "saved-1-plain")
    alone.step(batch_of(alone, STEPS, 8))
    found = torch.load(folder / f"{size}-0-resumed.pt", weights_only=True)
    torch.testing.assert_close(found, weights(alone), rtol=0, atol=1e-6)
    names = {file.name for file in (folder / f"saved-{size}-plain").iterdir()}
    assert names == {file.name for file in (folder / "saved-1-plain").iterdir()}
    back = learner_of(folder, CASES["plain"])
    assert back.restore(folder / f"saved-{size}-plain") == STEPS
    back.step(batch_of(back, STEPS, 8))
    torch.testing.assert_close(weights(back), weights(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("total", [0, 1, 7, 8, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_cover_every_row_once(total: int, size: int) -> None:
    parts = [Peers(rank, size).rows(total) for rank in range(size)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(total))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_state_goes_to_whoever_has_least() -> None:
    assert owners([5, 9, 4, 4], 2) == [1, 0, 1, 0]
    assert owners([3, 1], 1) == [0, 0]


def test_one_that_nobody_meets_says_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FleetError, match=f"learner 1 of 2 did not meet the others at .*{port}"):
        join(1, 2, f"127.0.0.1:{port}", "cpu", timeout_s=2.0)

"""Several learners are one: gradients, steps, statistics and checkpoints, over gloo."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from actors.checkpoints.loading import init_policy
from actors.decoding import decode
from cluster.errors import FleetError
from cluster.messages import SamplingSpec, WeightSnapshot
from cluster.model_files.tensors import write_tensors
from cluster.weights import open_snapshot
from learner.grpo.loss import LossConfig
from learner.training import compilation, data_parallel, state_files
from learner.training.data_parallel import DataParallelGroup, join, open_rendezvous
from learner.training.learner import Learner
from learner.training.lora import LoraConfig
from learner.training.optimizer import OptimizerConfig
from learner.training.real_tokens import RealTokensConfig
from tests.unit.helpers import tiny_policy
from tests.unit.learner.training.test_learner_options import off_policy
from tests.unit.learner.training.test_policy import FAMILIES, gradients, trained
from tests.unit.learner.training.test_real_tokens import CLASSES, TOKENS
from tests.unit.learner_cases import (
    batch_of,
    gradient,
    make,
    optimizer_steps,
    parameters,
    tiny_policy_file,
    weights,
)

STEPS = 3
LIMIT = 0.05  # of the gradient's norm, so that it binds
SIZES = [2, pytest.param(3, marks=pytest.mark.slow)]
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
    "real, fewer than learners": {"rows": 1, "real": 0.3, "images": 2},
    "many passes": {"rows": 7, "microbatch": 1, "parts": 2},
    "checkpointed": {"rows": 7, "options": {"checkpointing": True}},
    "reference": {"rows": 5, "loss": LossConfig(kl_coef=0.5), "microbatch": 2},
    "adapters": {
        "rows": 5,
        "loss": LossConfig(kl_coef=0.5),
        "options": {"lora": LoraConfig(rank=2)},
        "microbatch": 2,
    },
    "large, logits in pieces": {
        "rows": 7,
        "microbatch": 2,
        "large": True,
        "pieces": 80,
        "options": {"checkpointing": True},
    },
    "guided": {"rows": 5, "spec": SamplingSpec(cfg_scale=1.5, guidance="guided")},
}
ROUNDED = {
    "bf16": {"rows": 7, "options": {"precision": "bf16"}},
}
EXCHANGES = {
    "exchanges in fp32": {"rows": 7, "microbatch": 1, "updates": 2, "real": 0.3},
    "exchanges in bf16": {"rows": 7, "microbatch": 1, "options": {"precision": "bf16"}},
    "exchanges of a large policy": {"rows": 7, "microbatch": 1, "large": True},
}
FAMILY_OPTIONS: list[dict] = [
    {},
    {"checkpointing": True},
    {"lora": LoraConfig(rank=3)},
    {"precision": "bf16"},
]
COMPILED = {"compile": "always", "checkpointing": True}


def learner_of(folder: Path, case: dict, microbatch: int = 8) -> Learner:
    options = OptimizerConfig(
        lr=1e-5,
        microbatch=case.get("microbatch", microbatch),
        updates_per_iteration=case.get("updates", 1),
        minibatches=case.get("parts", 1),
        max_grad_norm=LIMIT,
        **case.get("options", {}),
    )
    real = RealTokensConfig(
        weight=case.get("real", 0.0), source=str(folder / "real.npz"), batch=case.get("images", 5)
    )
    changes = {name: case[name] for name in ("loss", "spec") if name in case}
    return make(str(folder / "policy.safetensors"), optimizer=options, real=real, **changes)


def train(learner: Learner, case: dict) -> list[dict[str, float]]:
    """Steps on what the learner itself draws; stale, if its logprobs say otherwise."""
    given = {"spec": case["spec"]} if "spec" in case else {}
    draw = off_policy if case.get("stale") else batch_of
    return [learner.step(draw(learner, at, case["rows"], **given)).metrics for at in range(STEPS)]


class Place:
    """One process's place in a group. It is taken anew for every learner: a process can be in one
    group at a time."""

    def __init__(self, rank: int, size: int, addresses: list[str]) -> None:
        self._rank, self._size, self._addresses = rank, size, iter(addresses)

    def learner(self, folder: Path, case: dict) -> Learner:
        """A member of the group, which gives out the first one's snapshots: tests draw rollouts
        from them."""
        made = learner_of(folder, case)
        data_parallel.GATHERED_BELOW = 0 if "large" in case else 1 << 30
        decode.LOGITS_AT_ONCE = case.get("pieces", 1 << 25)
        own, rank = made.snapshot, self._rank

        def of_the_first() -> WeightSnapshot:
            found = [own()]
            assert bool(open_snapshot(found[0]).tensors) == (rank == 0)
            torch.distributed.broadcast_object_list(found, 0)
            return found[0]

        made.snapshot = of_the_first
        self.leave()
        made.join(self._rank, self._size, next(self._addresses))
        return made

    def dp_group(self) -> DataParallelGroup:
        self.leave()
        return join(self._rank, self._size, next(self._addresses), "cpu", timeout_s=60.0)

    def leave(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # nobody leaves while another still reads from it
            torch.distributed.destroy_process_group()


def family_gradients(
    folder: Path, dp_group: DataParallelGroup, **options: object
) -> dict[str, torch.Tensor]:
    """Of every family of policies, the same rollouts at each learner; whole, at the first."""
    found = {}
    for name in FAMILIES:
        policy = trained(str(folder / f"{name}.safetensors"), **options)
        policy.join(dp_group)
        whole = dp_group.gather(gradients(policy))
        found |= {f"{name}/{key}": gradient for key, gradient in whole.items()}
    return found


def one_broken_step(learner: Learner) -> dict:
    """A step on rollouts of which the first learner has one without a finite advantage; then a
    sound one."""
    batch, before = batch_of(learner, 0, 8), weights(learner)
    advantages = np.where(np.arange(8) == 0, np.nan, batch.advantages).astype(np.float32)
    taken: list[torch.optim.Optimizer] = []
    with optimizer_steps(taken.append):
        broken = learner.step(dataclasses.replace(batch, advantages=advantages))
    untouched = torch.equal(weights(learner), before)
    sound = learner.step(batch_of(learner, 1, 8))
    return {
        "broken": broken.metrics["guards/skipped_updates"],
        "untouched": untouched,
        "optimizer steps": len(taken),
        "sound": sound.metrics["guards/skipped_updates"],
        "moved": not torch.equal(weights(learner), before),
    }


def exchanges(learner: Learner, rows: int) -> list[tuple[str, str, int]]:
    """Number of a step's exchanges of weights and of gradients, by kind and dtype."""
    batch, counts = batch_of(learner, 0, rows), Counter[tuple[str, str]]()
    with pytest.MonkeyPatch.context() as patch:
        for kind in (_fsdp_collectives.DefaultAllGather, _fsdp_collectives.DefaultReduceScatter):
            original = kind.__call__

            def counted(
                self: object,
                *given: Any,
                of: Any = original,
                name: str = kind.__name__,
                **more: Any,
            ) -> object:
                sent = more.get("input_tensor", given[1] if len(given) > 1 else None)
                counts[name.removeprefix("Default"), str(sent.dtype)] += 1
                return of(self, *given, **more)

            patch.setattr(kind, "__call__", counted)
        learner.step(batch)
    return sorted((*key, count) for key, count in counts.items())


@contextmanager
def written_later(learner: Learner, folder: Path) -> Iterator[None]:
    """A checkpoint in the background, whose thread writes at the end of the block."""
    held, write = threading.Event(), state_files.write_tensors

    def slow(*given: Any, **more: Any) -> None:
        assert held.wait(60)
        write(*given, **more)

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_files, "write_tensors", slow)
        learner.save(folder, background=True)
        yield
        held.set()
        assert learner.saved(60)


def kept_by(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Numbers that this learner has of the weights, their gradients and averages of these."""
    own, states = parameters(optimizer), optimizer.state.values()
    return {
        "weights": sum(p.to_local().numel() for p in own),
        "gradients": sum(p.grad.to_local().numel() for p in own),
        "averages": sum(state["exp_avg"].to_local().numel() for state in states),
    }


def member(rank: int, size: int, addresses: list[str], folder: Path) -> None:
    """One learner of a group, in a process of its own."""
    torch.set_num_threads(1)
    results: dict = {}
    place = Place(rank, size, addresses)
    for name, case in (CASES | ROUNDED).items():
        learner = place.learner(folder, case)
        results[name] = {"metrics": train(learner, case)}
        torch.save(weights(learner), folder / f"{size}-{rank}-{name}.pt")
        (folder / f"saved-{size}-{name}").mkdir(exist_ok=True)
        learner.save(folder / f"saved-{size}-{name}")
    for name, case in EXCHANGES.items():
        results[name] = exchanges(place.learner(folder, case), case["rows"])
    learner, parts = place.learner(folder, CASES["plain"]), []
    with optimizer_steps(lambda of: parts.extend(p.grad.full_tensor() for p in parameters(of))):
        results["norm"] = learner.step(off_policy(learner)).metrics["loss/grad_norm"]
    torch.save(torch.cat([part.flatten() for part in parts]), folder / f"{size}-{rank}-gradient.pt")
    learner.restore(folder / "saved-1-plain")
    with (
        written_later(learner, folder / f"later-{size}"),
        optimizer_steps(lambda of: results.update(kept=kept_by(of))),
    ):
        learner.step(batch_of(learner, STEPS, 8))
    torch.save(weights(learner), folder / f"{size}-{rank}-resumed.pt")
    adapted = place.learner(folder, CASES["adapters"])
    adapted.restore(folder / "saved-1-adapters")
    torch.save(weights(adapted), folder / f"{size}-{rank}-adapted.pt")
    results["skipped"] = one_broken_step(place.learner(folder, CASES["plain"]))
    dp_group = place.dp_group()
    compilation.BACKEND = "aot_eager"  # traces all, generates no code
    for options in [*FAMILY_OPTIONS, *([COMPILED] if size > 2 else [])]:
        found = family_gradients(folder, dp_group, **options)
        torch.save(found, folder / f"{size}-{rank}-{sorted(options)}.pt")
    (folder / f"{size}-{rank}.json").write_text(json.dumps(results))
    place.leave()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one learner."""
    folder = tmp_path_factory.mktemp("groups")
    tiny_policy_file(folder)
    np.savez(folder / "real.npz", tokens=TOKENS, classes=CLASSES)
    for name, architecture in FAMILIES.items():
        torch.manual_seed(0)
        tensors = init_policy(architecture).state_dict()
        write_tensors(folder / f"{name}.safetensors", tensors, architecture.to_dict())
    for name, case in (CASES | ROUNDED).items():
        learner = learner_of(folder, case)
        (folder / f"1-0-{name}.json").write_text(json.dumps(train(learner, case)))
        torch.save(weights(learner), folder / f"1-0-{name}.pt")
        (folder / f"saved-1-{name}").mkdir()
        learner.save(folder / f"saved-1-{name}")
    return folder


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest) -> int:
    """Learners of a group."""
    return request.param


@pytest.fixture(scope="module")
def folder(alone: Path, size: int) -> Path:
    """The same cases by a group. Its processes are forked from one that has imported everything."""
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo", "peft"])
    joins = len(CASES | ROUNDED | EXCHANGES) + 4
    stores, addresses = zip(*(open_rendezvous("127.0.0.1", size) for _ in range(joins)))
    arguments = (size, addresses, alone)
    torch.multiprocessing.start_processes(member, arguments, size, start_method="forkserver")
    del stores
    return alone


def of(folder: Path, size: int, rank: int = 0) -> dict:
    return json.loads((folder / f"{size}-{rank}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_group_is_one_learner_over_several_steps(folder: Path, size: int, name: str) -> None:
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


def test_a_group_in_bf16_goes_where_one_learner_goes(folder: Path, size: int) -> None:
    """Not to 1e-6: bf16 products of other shapes round otherwise."""
    start = weights(learner_of(folder, CASES["plain"]))
    moved, found = (
        torch.load(folder / f"{of}-0-bf16.pt", weights_only=True) - start for of in (1, size)
    )
    assert torch.cosine_similarity(moved, found, dim=0) > 0.95


def test_gradients_are_exchanged_once_an_update(folder: Path, size: int) -> None:
    """Of two blocks and the rest: once an update, however many passes it has, in fp32. Weights of
    small policies, too: blocks in the precision of the passes, the rest in fp32."""
    fp32, bf16 = "torch.float32", "torch.bfloat16"
    for rank in range(size):
        found = of(folder, size, rank)
        assert found["exchanges in fp32"] == [["AllGather", fp32, 6], ["ReduceScatter", fp32, 6]]
        assert found["exchanges in bf16"] == [
            ["AllGather", bf16, 2],
            ["AllGather", fp32, 1],
            ["ReduceScatter", fp32, 3],
        ]
        gathers, reductions = found["exchanges of a large policy"]
        assert reductions == ["ReduceScatter", fp32, 3]
        passes = -(-7 // size)
        assert gathers[2] >= 2 * 2 * passes  # of each block, in both directions


@pytest.mark.parametrize("options", [*FAMILY_OPTIONS, COMPILED], ids=str)
def test_every_family_can_be_divided(folder: Path, size: int, options: dict) -> None:
    """Captions, too, whose rows go through a block beside its forward pass."""
    if options is COMPILED and size == 2:
        pytest.skip("compilation takes seconds: in the nightly run, in the larger group")
    as_it_is = {**options, "compile": "never"}
    expected = family_gradients(folder, DataParallelGroup(), **as_it_is)
    found = torch.load(folder / f"{size}-0-{sorted(options)}.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, ours in expected.items():
        gap = (found[name] / size - ours).norm()
        # gains of norms are rounded, too, where weights are gathered in bf16
        allowed = 0.02 if "precision" in options else 1e-5
        assert gap <= allowed * ours.norm() + 1e-6 * ours.numel() ** 0.5, name


def test_a_group_leaves_an_update_out_together(folder: Path, size: int) -> None:
    """Also those whose own rollouts are sound."""
    left_out = {"broken": 1, "untouched": True, "optimizer steps": 0, "sound": 0, "moved": True}
    for rank in range(size):
        assert of(folder, size, rank)["skipped"] == left_out, rank


def test_the_gradient_is_the_sum_of_the_parts(folder: Path, size: int) -> None:
    """Averaged by rollouts, not over learners; limited by the norm of the whole."""
    learner = learner_of(folder, CASES["plain"])
    expected = gradient(learner, off_policy(learner), limit=LIMIT)
    norm = expected.norm().item()
    assert norm > LIMIT
    assert of(folder, size)["norm"] == pytest.approx(norm, rel=1e-5)
    found = torch.load(folder / f"{size}-0-gradient.pt", weights_only=True)
    torch.testing.assert_close(found, expected * LIMIT / norm, rtol=0, atol=1e-6)


def test_gradients_of_one_learner_and_of_accumulation_are_equal(alone: Path) -> None:
    whole = learner_of(alone, CASES["plain"], microbatch=8)
    single = learner_of(alone, CASES["plain"], microbatch=1)
    batch = batch_of(whole, rows=8)
    one, other = (gradient(learner, batch, limit=LIMIT) for learner in (whole, single))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for iteration in range(STEPS):
        batch = batch_of(whole, iteration)
        whole.step(batch)
        single.step(batch)
    torch.testing.assert_close(weights(single), weights(whole), rtol=0, atol=1e-6)


def test_weights_gradients_and_state_are_divided(folder: Path, size: int) -> None:
    total = sum(p.numel() for p in tiny_policy().parameters())
    for what in ("weights", "gradients", "averages"):
        kept = [of(folder, size, rank)["kept"][what] for rank in range(size)]
        assert sum(kept) == total, what
        assert max(kept) < 1.1 * total / size, what


def test_checkpoints_do_not_depend_on_the_number_of_learners(folder: Path, size: int) -> None:
    """Of one, read by a group; and of a group, read by one."""
    alone = learner_of(folder, CASES["plain"])
    alone.restore(folder / "saved-1-plain")
    alone.step(batch_of(alone, STEPS, 8))
    found = torch.load(folder / f"{size}-0-resumed.pt", weights_only=True)
    torch.testing.assert_close(found, weights(alone), rtol=0, atol=1e-6)
    of_one = {file.name: file.read_bytes() for file in (folder / "saved-1-plain").iterdir()}
    assert of_one.keys() == {file.name for file in (folder / f"saved-{size}-plain").iterdir()}
    for name, content in of_one.items():  # as restored, not as the next step left it
        assert (folder / f"later-{size}" / name).read_bytes() == content, name
    back = learner_of(folder, CASES["plain"])
    assert back.restore(folder / f"saved-{size}-plain") == STEPS
    back.step(batch_of(back, STEPS, 8))
    torch.testing.assert_close(weights(back), weights(alone), rtol=0, atol=1e-6)


def test_adapters_do_not_depend_on_the_number_of_learners(folder: Path, size: int) -> None:
    expected = torch.load(folder / "1-0-adapters.pt", weights_only=True)
    found = torch.load(folder / f"{size}-0-adapted.pt", weights_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    back = learner_of(folder, CASES["adapters"])
    back.restore(folder / f"saved-{size}-adapters")
    torch.testing.assert_close(weights(back), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("total", [0, 1, 7, 8, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_cover_every_row_once(total: int, size: int) -> None:
    parts = [DataParallelGroup(rank, size).shard(total) for rank in range(size)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(total))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_the_largest_part_is_counted() -> None:
    """Rows 0 to 2 of 7 are the first's, 3 to 6 the second's."""
    assert DataParallelGroup(0, 2).max_local(np.array([0, 2, 3, 5, 6]), 7) == 3
    assert DataParallelGroup(1, 2).max_local(np.array([0, 1, 2, 6]), 7) == 3
    assert DataParallelGroup().max_local(np.arange(7), 7) == 7


def test_one_that_nobody_meets_says_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FleetError, match=f"learner 1 of 2 did not meet the others at .*{port}"):
        join(1, 2, f"127.0.0.1:{port}", "cpu", timeout_s=2.0)

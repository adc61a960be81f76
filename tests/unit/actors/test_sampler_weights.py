"""Weights that a sampler loads or refuses, and what the learner sends it."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.checkpoints.loading import PolicyConfig, TokenizerConfig, load_decoder
from actors.sampler import Sampler, SamplerConfig, SamplerResources
from cluster.errors import CheckpointError, FleetError
from cluster.messages import Condition, RolloutGroup, SampleRequest, SamplingSpec
from cluster.weights import Packer, load_weights, pack_weights, unpack_weights
from learner.training.batch import StepReport
from learner.training.learner import Learner
from learner.training.lora import LoraConfig
from learner.training.optimizer import OptimizerConfig
from tests.unit.helpers import TINY, random_policy, tiny_policy
from tests.unit.learner_cases import batch_of, make, tiny_policy_file


def sampler(policy_file: str, dtype: str = "float32") -> Sampler:
    resources = SamplerResources(dtype=dtype)  # type: ignore[arg-type]
    config = SamplerConfig(policy=PolicyConfig(checkpoint=policy_file), resources=resources)
    return Sampler(config, "sampler-1")


def held(role: Sampler) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in role._policy.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_what_is_refused_leaves_the_sampler_as_it_was(tmp_path: Path) -> None:
    role = sampler(tiny_policy_file(tmp_path))
    good = tiny_policy(1).state_dict()
    assert role.load_weights(pack_weights(good, 4)) == 4
    assert role.load_weights(pack_weights(good, 4)) == 4  # a retry

    corrupt = pack_weights(tiny_policy(2).state_dict(), 5)
    corrupt.buffer[100] ^= 4
    larger = random_policy(dataclasses.replace(TINY, dim=64))
    adapters = dataclasses.replace(lora_learner(tmp_path).adapter_snapshot(), version=5)
    refused = {
        "sampler-1 holds version 4 and refuses the older 3": pack_weights(good, 3),
        "snapshot 5 is damaged": corrupt,
        "snapshot 5 is of another architecture": pack_weights(larger.state_dict(), 5),
        "num_heads is 1, expected 2": Packer()(good, 5, config={**TINY.to_dict(), "num_heads": 1}),
        "manifest speaks of version 0": adapters,
    }
    for message, snapshot in refused.items():
        with pytest.raises(CheckpointError, match=message):
            role.load_weights(snapshot)
        assert role.version == 4
        assert same(held(role), good)


def request(group: int = 0, count: int = 3) -> SampleRequest:
    return SampleRequest(
        stream="train",
        iteration=0,
        group=group,
        condition=Condition(text="x", class_index=1),
        num_rollouts=count,
        seed=0,
        spec=SamplingSpec(),
    )


def test_images_do_not_depend_on_the_sampler_that_decodes_them(tmp_path: Path) -> None:
    role, other = (sampler(tiny_policy_file(tmp_path)) for _ in range(2))
    with pytest.raises(FleetError, match="sampler-1 was asked to sample before it was given"):
        role.sample([request()])[0]
    role.load_weights(pack_weights(tiny_policy(1).state_dict(), 4))
    groups = [role.sample([request(group)])[0] for group in range(4)]
    alone = [other.images(group)[0] for group in groups]  # it never had weights
    codes = tiny_policy().codes(torch.from_numpy(groups[1].tokens).long())
    decoder = load_decoder(TokenizerConfig())
    assert np.array_equal(alone[1], decoder.pixels(codes).numpy())
    assert (alone[0].shape[0], alone[0].dtype) == (3, np.uint8)
    smaller = dataclasses.replace(groups[1].request, image_size=5)
    resized = role.images(dataclasses.replace(groups[1], request=smaller))[0]
    assert np.array_equal(resized, decoder.pixels(codes, 5).numpy())
    assert resized.shape[1:3] == (5, 5)

    with ThreadPoolExecutor(1) as beside:  # as on Ray
        again, pending = [], []
        for number in range(4):
            again.append(role.sample([request(number)])[0])
            pending.append(beside.submit(role.images, again[-1]))
        images, spans = zip(*(answer.result() for answer in pending))
    for number in range(4):
        assert np.array_equal(again[number].tokens, groups[number].tokens)
        assert np.array_equal(again[number].logprobs, groups[number].logprobs)
        assert np.array_equal(images[number], alone[number])
    assert {(span.worker, span.phase) for span in spans} == {("sampler-1", "decode")}


def test_training_groups_report_weight_loads_and_packing(tmp_path: Path) -> None:
    learner, role = make(tiny_policy_file(tmp_path)), sampler(tiny_policy_file(tmp_path))
    role.load_weights(learner.snapshot())
    role.load_weights(learner.snapshot())
    gallery = role.sample([dataclasses.replace(request(), stream="gallery")])[0]
    assert phases(gallery) == ["sample"]  # nobody keeps these
    first = role.sample([request()])[0]
    assert phases(first) == ["load", "load", "sample"]
    assert {span.worker for span in first.spans} == {"sampler-1"}
    ends = [span.end for span in first.spans]
    starts = [span.start for span in first.spans]
    assert all(start >= end for start, end in zip(starts[1:], ends))
    assert phases(role.sample([request()])[0]) == ["sample"]
    report = learner.step(batch_of(learner))  # which packs a snapshot, too, to draw with
    assert phases(report) == ["pack", "pack", "pack", "learn"]
    assert phases(learner.step(batch_of(learner, 1))) == ["pack", "learn"]


def phases(told: RolloutGroup | StepReport) -> list[str]:
    return [span.phase for span in told.spans]


def test_groups_decoded_together_are_those_decoded_alone(tmp_path: Path) -> None:
    role = sampler(tiny_policy_file(tmp_path))
    role.load_weights(pack_weights(tiny_policy(1).state_dict(), 4))
    asked = [request(group) for group in range(4)]
    asked[2] = dataclasses.replace(asked[2], condition=Condition(text="y", class_index=0))
    alone = [role.sample([each])[0] for each in asked]
    together = role.sample(asked)
    for one, other, each in zip(alone, together, asked, strict=True):
        assert (other.request, other.version) == (each, 4)
        assert other.tokens.shape == (3, TINY.num_tokens)
        # another size of matrix may round otherwise; these draws are far from any edge
        assert np.array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(one.entropies, other.entropies, atol=1e-5)
    assert [phases(group) for group in together] == [["sample"], [], [], []]
    again = role.sample(asked[:1])[0]  # in its own cache: the same to the bit
    assert np.array_equal(again.logprobs, alone[0].logprobs)
    with pytest.raises(FleetError, match=r"requests together that differ in .* number of rollouts"):
        role.sample([asked[0], request(1, count=2)])


@pytest.mark.parametrize("number", [0, 3, -2])
def test_the_size_of_batches_is_a_power_of_two(number: int) -> None:
    with pytest.raises(ValueError, match="max_groups must be 1, 2, 4, 8"):
        SamplerResources(max_groups=number)
    assert SamplerResources(max_groups=4).max_groups == 4


def lora_learner(folder: Path) -> Learner:
    lora = LoraConfig(rank=2)
    return make(tiny_policy_file(folder), optimizer=OptimizerConfig(lr=1e-2, lora=lora))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_at_the_sampler_are_the_merged_weights(tmp_path: Path, dtype: str) -> None:
    """Bit for bit: the base is in full precision, and rounded after the sum."""
    learner = lora_learner(tmp_path)
    base = learner.base_snapshot()
    assert same(unpack_weights(base), tiny_policy().state_dict())
    ours, merged = (sampler(tiny_policy_file(tmp_path), dtype) for _ in range(2))
    for iteration in range(3):
        learner.step(batch_of(learner, iteration))
        adapters = learner.adapter_snapshot()
        assert adapters.base == 0
        assert ours.load_weights(adapters, base) == learner.version
        merged.load_weights(learner.snapshot())
        assert same(held(ours), held(merged))
    late = sampler(tiny_policy_file(tmp_path), dtype)
    with pytest.raises(CheckpointError, match=r"builds upon version 0 .* full snapshot must come"):
        late.load_weights(adapters)
    assert late.load_weights(adapters, base) == learner.version
    assert same(held(late), held(ours))


def test_a_restored_learner_sends_the_adapters_that_it_saved(tmp_path: Path) -> None:
    learner = lora_learner(tmp_path)
    for iteration in range(2):
        learner.step(batch_of(learner, iteration))
    learner.save(tmp_path)
    again = lora_learner(tmp_path)
    assert again.restore(tmp_path) == 2
    assert np.array_equal(again.base_snapshot().buffer, learner.base_snapshot().buffer)
    one, other = again.adapter_snapshot(), learner.adapter_snapshot()
    assert (one.manifest, one.buffer.tobytes()) == (other.manifest, other.buffer.tobytes())


def test_bf16_on_the_wire_is_what_bf16_samplers_would_round_to(tmp_path: Path) -> None:
    file = tiny_policy_file(tmp_path)
    exact, rounded = make(file), make(file, wire_dtype="bfloat16")
    assert rounded.snapshot().nbytes < 0.6 * exact.snapshot().nbytes
    one, other = sampler(file, "bfloat16"), sampler(file, "bfloat16")
    one.load_weights(exact.snapshot())
    other.load_weights(rounded.snapshot())
    assert same(held(one), held(other))


def test_what_is_sent_from_the_device_loads_alike(tmp_path: Path) -> None:
    learner, policy, sent = make(tiny_policy_file(tmp_path)), tiny_policy(1), []
    snapshot = learner.snapshot(send=sent.append)
    assert isinstance(sent[0].buffer, torch.Tensor)
    assert sent[0].manifest == snapshot.manifest
    load_weights(policy, sent[0])
    assert same(dict(policy.state_dict()), dict(tiny_policy().state_dict()))

"""Checks 2 to 4: captured decoding in bf16 gives what the learner computes, again and again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from actors.checkpoints.loading import PolicyConfig, TokenizerConfig
from actors.decoding.decode import Decoded, decode_tokens, token_logprobs
from actors.decoding.steps import Workspace, with_null_conditions
from actors.models.base import Conditions
from actors.models.llamagen import LlamaGen
from actors.models.vq import VQConfig, VQTokenizer
from actors.sampler import Sampler, SamplerConfig, SamplerResources
from cluster.messages import Condition, SampleRequest, SamplingSpec
from cluster.model_files.tensors import write_tensors
from cluster.weights import Packer
from tests.bench.gpu.scene import Scene
from tests.bench.measuring import random_llamagen

GUIDED = SamplingSpec(cfg_scale=1.5, guidance="guided")
AT_ONCE = 16  # images of a teacher-forced pass
CAPTION_DIM = 2048


def logprobs(scene: Scene) -> None:
    """Logprobs of the sampler (bf16, captured) against the learner's pass (fp32 weights under
    autocast) and fp32, at 24 and 512 rows, and with captions."""
    few, many = scene.size(12, 2), scene.size(256, 4)
    compare(scene, "rows_24", few)
    if not scene.quick:
        compare(scene, "rows_512", many)
        captions(scene, few)


def compare(scene: Scene, name: str, images: int) -> None:
    policy, exact = scene.policy(torch.bfloat16), scene.policy(torch.float32)
    conditions = classes(scene, images)
    drawn = decode(scene, policy, conditions, Workspace(policy))
    learner = teacher_forced(exact, drawn.tokens, conditions, autocast=True)
    gap, k3 = apart(drawn.logprobs, learner)
    scene.figure(f"{name}_logprob_gap", gap)
    scene.figure(f"{name}_k3", k3)
    if name == "rows_24":
        fp32 = teacher_forced(exact, drawn.tokens, conditions, autocast=False)
        scene.figure("fp32_logprob_gap", apart(drawn.logprobs, fp32)[0])


def captions(scene: Scene, images: int) -> None:
    """The same with captions of several lengths: a bias on slot 0, and a mask in the learner."""
    config = scene.config(caption_dim=scene.size(CAPTION_DIM, 16), num_classes=0)
    exact = random_llamagen(config, scene.device, torch.float32)
    policy = random_llamagen(config, scene.device, torch.bfloat16)
    policy.load_state_dict(exact.state_dict())
    generator = np.random.default_rng(0)
    asked = []
    for row in range(images):
        length = 1 + row * 37 % config.caption_tokens
        features = generator.normal(size=(length, config.caption_dim)).astype(np.float32)
        asked.append(Condition(text=f"caption {row}", features=features))
    drawn = decode(scene, policy, policy.encode(asked), Workspace(policy))
    learner = teacher_forced(exact, drawn.tokens, exact.encode(asked), autocast=True)
    gap, k3 = apart(drawn.logprobs, learner)
    scene.figure("captions_logprob_gap", gap)
    scene.figure("captions_k3", k3)


def repeat(scene: Scene) -> None:
    """The same tokens from the same workspace again; with new weights, between decodings and in
    the middle of one, and with other numbers of rows, those of a fresh workspace."""
    policy = scene.policy(torch.bfloat16)
    images = scene.size(12, 4)
    conditions, half = classes(scene, images), classes(scene, images // 2)
    workspace = Workspace(policy)
    first = decode(scene, policy, conditions, workspace)
    scene.figure("repeat_same", same(decode(scene, policy, conditions, workspace), first))
    other = {name: tensor.roll(1, 0) for name, tensor in policy.state_dict().items()}
    with new_weights(policy, other):
        reused = decode(scene, policy, conditions, workspace)
        fresh = decode(scene, policy, conditions, Workspace(policy))
    scene.figure("new_weights_same", same(reused, fresh))
    scene.figure("new_weights_differ", float(same(fresh, first) < 1))
    middle = [switched(scene, policy, conditions, w, other) for w in (workspace, Workspace(policy))]
    scene.figure("mid_weights_same", float(torch.equal(*middle)))
    scene.figure("mid_weights_differ", float(not torch.equal(middle[0], first.tokens)))
    few = decode(scene, policy, half, workspace)
    scene.figure("fewer_rows_same", same(few, decode(scene, policy, half, Workspace(policy))))
    scene.figure("rows_again_same", same(decode(scene, policy, conditions, workspace), first))


def beside(scene: Scene) -> None:
    """The first capture of a sampler's steps while its other thread decodes images."""
    sampler, requests = make_sampler(scene)
    alone = sampler.sample(requests[:1])[0]
    serial = sampler.images(alone)[0]
    fresh, _ = make_sampler(scene)
    stop, made, errors = threading.Event(), list[np.ndarray](), list[BaseException]()

    def paint() -> None:
        try:
            while not stop.is_set():
                made.append(fresh.images(alone)[0])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=paint)
    thread.start()
    try:
        groups = [fresh.sample([request])[0] for request in requests]
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
    scene.note(f"{len(made)} groups of images beside {len(groups)} of tokens")
    scene.figure("beside_tokens_same", float(np.array_equal(groups[0].tokens, alone.tokens)))
    levels = [np.abs(images.astype(int) - serial).max() for images in made]
    scene.figure("beside_levels_apart", max(levels))


def make_sampler(scene: Scene) -> tuple[Sampler, list[SampleRequest]]:
    """A sampler of the size with random weights, loaded; and requests of several sizes."""
    policy = scene.policy(torch.float32)
    files = {name: scene.folder() / f"{name}.safetensors" for name in ("policy", "tokenizer")}
    if not files["policy"].exists():
        write_tensors(files["policy"], policy.state_dict(), policy.config.to_dict())
        torch.manual_seed(0)
        tokenizer = VQTokenizer(vq_config(scene))
        write_tensors(files["tokenizer"], tokenizer.state_dict(), tokenizer.config.to_dict())
    config = SamplerConfig(
        policy=PolicyConfig(checkpoint=str(files["policy"])),
        tokenizer=TokenizerConfig(checkpoint=str(files["tokenizer"])),
        resources=SamplerResources(
            num_gpus=1 if scene.on_gpu else 0, dtype="bfloat16", num_threads=scene.threads
        ),
    )
    sampler = Sampler(config)
    packer = Packer(torch.bfloat16)
    sampler.load_weights(packer(policy.state_dict(), 0, config=policy.config.to_dict()))
    requests = [
        SampleRequest(
            stream="train",
            iteration=0,
            group=group,
            condition=Condition(text="", class_index=group),
            num_rollouts=rollouts,
            seed=0,
            spec=GUIDED,
        )
        for group, rollouts in enumerate((scene.size(12, 2), scene.size(6, 1)))
    ]
    return sampler, requests


def vq_config(scene: Scene) -> VQConfig:
    """LlamaGen's VQ-16."""
    if not scene.tiny:
        return VQConfig()
    vocab = scene.config().vocab_size
    return VQConfig(
        channels=32, z_channels=32, multipliers=(1, 1), num_res_blocks=1, codebook_size=vocab
    )


def classes(scene: Scene, images: int) -> Conditions:
    config = scene.config()
    return Conditions(torch.arange(images, device=scene.device) % config.num_classes)


def uniforms(scene: Scene, images: int, tokens: int) -> Tensor:
    found = np.random.default_rng(0).random((images, tokens))
    return torch.from_numpy(found).to(scene.device)


def decode(scene: Scene, policy: LlamaGen, conditions: Conditions, workspace: Workspace) -> Decoded:
    """Guided, with the same uniforms each time."""
    draws = uniforms(scene, len(conditions), policy.num_tokens)
    return decode_tokens(policy, conditions, draws, GUIDED, workspace)


@torch.inference_mode()
def switched(
    scene: Scene,
    policy: LlamaGen,
    conditions: Conditions,
    workspace: Workspace,
    other: dict[str, Tensor],
) -> Tensor:
    """Tokens (B, T) with other weights from the middle on."""
    draws = uniforms(scene, len(conditions), policy.num_tokens)
    inputs = with_null_conditions(policy, conditions, GUIDED)
    columns = [workspace.prefill(inputs, draws[:, 0], GUIDED).tokens]
    half = policy.num_tokens // 2
    for place in range(1, half):
        columns.append(workspace.step(columns[-1], draws[:, place], GUIDED).tokens)
    with new_weights(policy, other):
        for place in range(half, policy.num_tokens):
            columns.append(workspace.step(columns[-1], draws[:, place], GUIDED).tokens)
    return torch.stack(columns, dim=1)


@contextmanager
def new_weights(policy: LlamaGen, other: dict[str, Tensor]) -> Iterator[None]:
    """Write other weights in place, as a load does; the old ones return after the block."""
    old = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    policy.load_state_dict(other)
    try:
        yield
    finally:
        policy.load_state_dict(old)


@torch.no_grad()
def teacher_forced(
    policy: LlamaGen, tokens: Tensor, conditions: Conditions, *, autocast: bool
) -> Tensor:
    """Logprobs (B, T) of tokens by a learner's pass."""
    device = tokens.device.type
    parts = []
    for at in range(0, len(tokens), AT_ONCE):
        rows = slice(at, at + AT_ONCE)
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            parts.append(token_logprobs(policy, tokens[rows], conditions[rows], GUIDED)[0])
    return torch.cat(parts)


def apart(sampler: Tensor, learner: Tensor) -> tuple[float, float]:
    """Mean |difference| of logprobs, and the mean of KL's estimator k3."""
    difference = (learner - sampler).double()
    return difference.abs().mean().item(), (difference.exp() - 1 - difference).mean().item()


def same(a: Decoded, b: Decoded) -> float:
    """1 where tokens, logprobs and entropies are equal bit for bit, else the share of equal
    tokens, less than 1."""
    if all(torch.equal(one, other) for one, other in zip(astuple(a), astuple(b))):
        return 1.0
    return min((a.tokens == b.tokens).double().mean().item(), 0.999)


def astuple(decoded: Decoded) -> tuple[Tensor, Tensor, Tensor]:
    return decoded.tokens, decoded.logprobs, decoded.entropies

"""Checks 7 and 10: a learner's step, as the preset has it and in variants; the same step twice; and
its weights' way to a sampler."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.checkpoints.loading import PolicyConfig
from actors.decoding.decode import decode_tokens
from actors.decoding.steps import Workspace
from cluster.messages import Condition, WeightSnapshot
from cluster.model_files.tensors import write_tensors
from cluster.weights import Packer, load_weights
from learner.config import load_preset
from learner.training.batch import StepReport, TrainingBatch
from learner.training.config import LearnerConfig
from learner.training.learner import Learner
from tests.bench.gpu.decoding import classes, uniforms
from tests.bench.gpu.scene import Scene
from tests.bench.measuring import fastest, synchronise, timed

PRESET = load_preset("paper-fixed")
VARIANTS: dict[str, dict[str, Any]] = {
    "preset": {},
    "plain": {"compile": "never"},
    "recomputed": {"compile": "never", "checkpointing": True, "microbatch": 12},
}
"""Changes to the preset's learner, whose blocks are compiled on a GPU."""


def step(scene: Scene) -> None:
    """Seconds of a step on 144 rollouts of LlamaGen-L, two updates; the sampler's logprobs against
    the learner's; and whether the default step repeats bit for bit (nothing promises it)."""
    file, batch = policy_file(scene), rollouts(scene)
    first = None
    for name in ["preset"] if scene.quick else VARIANTS:
        weights = variant(scene, name, file, batch)
        first = weights if first is None else first
        free(scene)
    again = make(scene, file)
    again.step(batch)
    scene.figure("step_default_same", float(torch.equal(flat(again), first)))


def variant(scene: Scene, name: str, file: Path, batch: TrainingBatch) -> Tensor:
    """Seconds of a second step; returns all weights after the first."""
    if scene.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    learner = make(scene, file, **VARIANTS[name])
    report = learner.step(batch)
    if not took_updates(report):
        raise RuntimeError(f"{name}: updates were skipped, since they were not finite")
    if name == "preset":
        scene.figure("step_mismatch_kl", report.metrics["policy/mismatch_kl"])
    weights = flat(learner)
    scene.figure(f"step_{name}_s", timed(lambda: learner.step(batch), scene.device))
    if scene.on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
        scene.note(f"{name}: peak memory {peak:.1f} GiB")
    return weights


def reproducible(scene: Scene) -> None:
    """With `--reproducible`, the same step gives the same weights, bit for bit."""
    file = policy_file(scene)
    first, second = make(scene, file, reproducible=True), make(scene, file, reproducible=True)
    batch = rollouts(scene)
    updated = [took_updates(learner.step(batch)) for learner in (first, second)]
    same = torch.equal(flat(first), flat(second)) and all(updated)
    scene.figure("step_reproducible_same", float(same))
    del second
    free(scene)
    scene.figure("step_reproducible_s", timed(lambda: first.step(batch), scene.device))


def took_updates(report: StepReport) -> bool:
    """Whether no update was skipped: weights that nothing changed are equal, too."""
    return report.metrics["guards/skipped_updates"] == 0


def make(scene: Scene, file: Path, *, reproducible: bool = False, **changes: Any) -> Learner:
    """A learner as `paper-fixed` has it, with changes to its optimizer's options."""
    if scene.tiny:
        changes = {**changes, "microbatch": min(changes.get("microbatch", 2), 2)}
    options = dataclasses.replace(
        PRESET.learner, num_gpus=1 if scene.on_gpu else 0, num_threads=scene.threads, **changes
    )
    return Learner(
        LearnerConfig(
            policy=PolicyConfig(checkpoint=str(file)),
            optimizer=options,
            loss=PRESET.loss,
            spec=PRESET.sampling,
            iterations=PRESET.iterations,
            max_staleness=64,
            reproducible=reproducible,
            wire_dtype="bfloat16",
        )
    )


def policy_file(scene: Scene) -> Path:
    policy, file = scene.policy(torch.float32), scene.folder() / "policy.safetensors"
    if not file.exists():
        write_tensors(file, policy.state_dict(), policy.config.to_dict())
    return file


def rollouts(scene: Scene) -> TrainingBatch:
    """144 rollouts that the policy has just drawn, in bf16, with made-up advantages."""
    count, policy = scene.size(144, 4), scene.policy(torch.bfloat16)
    conditions, draws = classes(scene, count), uniforms(scene, count, policy.num_tokens)
    drawn = decode_tokens(policy, conditions, draws, PRESET.sampling, Workspace(policy))
    asked = (Condition(text="", class_index=int(c)) for c in conditions.values.cpu())
    return TrainingBatch(
        iteration=0,
        tokens=drawn.tokens.cpu().numpy().astype(np.int32),
        behaviour=drawn.logprobs.cpu().numpy(),
        conditions=tuple(asked),
        advantages=np.linspace(-1, 1, count).astype(np.float32),
        versions=np.zeros(count, np.int64),
        specs=(PRESET.sampling,),
    )


def flat(learner: Learner) -> Tensor:
    """All weights in a row, on the host."""
    return torch.from_numpy(np.array(learner.snapshot().buffer))


def free(scene: Scene) -> None:
    gc.collect()
    if scene.on_gpu:
        torch.cuda.empty_cache()


def weights(scene: Scene) -> None:
    """Pack fp32 weights as bf16, on the device and from there to the host; load either; compare
    with what the CPU makes of them."""
    learner, sampler = scene.policy(torch.float32), scene.policy(torch.bfloat16)
    config, state = learner.config.to_dict(), learner.state_dict()
    kept = {name: tensor.clone() for name, tensor in sampler.state_dict().items()}
    pack, sent = Packer(torch.bfloat16), list[WeightSnapshot]()
    host = pack(state, 1, config=config, send=sent.append)
    on_cpu = {name: tensor.cpu() for name, tensor in state.items()}
    expected = Packer(torch.bfloat16)(on_cpu, 1, config=config)
    scene.figure("snapshot_mib", host.nbytes / 2**20)
    scene.figure("manifests_same", float(host.manifest == expected.manifest))
    try:
        for name, snapshot in {"loaded": host, "loaded_on_device": sent[0]}.items():
            for parameter in sampler.parameters():
                parameter.zero_()
            load_weights(sampler, snapshot)
            scene.figure(f"{name}_same", same(sampler.state_dict(), kept))
    finally:
        sampler.load_state_dict(kept)  # later checks decode with it

    del host, expected, snapshot  # buffers are reused once no one holds them
    sent.clear()
    scene.figure("pack_on_device_s", min(until_sent(scene, pack, state) for _ in range(3)))
    scene.figure("pack_s", fastest([lambda: pack(state, 2, config=config)], scene.device, 3)[0])
    packed = pack(state, 2, config=config)
    loaded = fastest([lambda: load_weights(sampler, packed)], scene.device, 3)[0]
    scene.figure("load_s", loaded)


def until_sent(scene: Scene, pack: Packer, state: dict[str, Tensor]) -> float:
    """Seconds until a packed and summed snapshot is there on the device."""
    times = list[float]()

    def note(snapshot: WeightSnapshot) -> None:
        synchronise(scene.device)
        times.append(time.perf_counter() - start)

    synchronise(scene.device)
    start = time.perf_counter()
    pack(state, 2, send=note)
    return times[0]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return float(all(torch.equal(found[name], tensor) for name, tensor in expected.items()))

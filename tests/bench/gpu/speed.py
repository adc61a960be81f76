"""Check 5: seconds of decoding, its share of the roofline, and the official code's."""

from __future__ import annotations

from pathlib import Path

import torch

from actors.decoding.decode import decode_tokens
from actors.decoding.steps import Workspace
from actors.kernels import plain
from tests.bench.gpu.decoding import GUIDED, classes, decode, uniforms
from tests.bench.gpu.scene import Scene
from tests.bench.measuring import Official, Run, fastest, measure_machine

PROFILED = 12  # kernels that are named


def decode_speed(scene: Scene) -> None:
    """LlamaGen-L with guidance at 12, 128 and 256 images; LlamaGen's own `generate` at the
    largest; and where the time goes."""
    policy = scene.policy(torch.bfloat16)
    machine = measure_machine(scene.device, torch.bfloat16, small=scene.tiny)
    many = scene.size(128 if scene.quick else 256, 4)
    sizes = {12: scene.size(12, 1), 128: scene.size(128, 2), 256: many}
    workspace = Workspace(policy)
    for name, images in sizes.items():
        if scene.quick and name == 256:
            continue
        seconds = fastest([run_of(scene, images, workspace)], scene.device, 2)[0]
        share = machine.seconds(policy, 2 * images) / seconds
        scene.figure(f"decode_{name}_s", seconds)
        scene.figure(f"decode_{name}_roofline", share)
    if not scene.quick:
        without = run_of(scene, sizes[128], Workspace(policy, kernels=plain))
        scene.figure("decode_128_torch_s", fastest([without], scene.device, 1)[0])
    if scene.official and not scene.tiny:
        theirs = Official(Path(scene.official), scene.small, policy)
        rows = torch.arange(many, device=scene.device)
        run = run_of(scene, many, workspace)
        ours, official = fastest(
            [run, lambda: theirs.decode(rows, GUIDED.cfg_scale)], scene.device, 1
        )
        scene.figure("official_generate_s", official)
        scene.figure("generate_speedup", official / ours)
    else:
        scene.note("not compared with the official generate: no --official DIR")
    profile(scene, many, workspace)


def run_of(scene: Scene, images: int, workspace: Workspace) -> Run:
    policy = scene.policy(torch.bfloat16)
    conditions = classes(scene, images)
    draws = uniforms(scene, images, policy.num_tokens)
    return lambda: decode_tokens(policy, conditions, draws, GUIDED, workspace)


def profile(scene: Scene, images: int, workspace: Workspace) -> None:
    """Name the kernels that take most of a decoding."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    policy = scene.policy(torch.bfloat16)
    conditions = classes(scene, images)
    decode(scene, policy, conditions, workspace)
    activity = ProfilerActivity.CUDA if scene.on_gpu else ProfilerActivity.CPU
    with profiled(activities=[activity]) as found:
        decode(scene, policy, conditions, workspace)
    rows = found.key_averages()
    seconds = {row.key: time_of(row, scene.on_gpu) for row in rows}
    total = sum(seconds.values()) or 1.0
    longest = sorted(seconds, key=lambda key: seconds[key], reverse=True)[:PROFILED]
    for key in longest:
        count = next(row.count for row in rows if row.key == key)
        scene.note(f"{seconds[key] / total:5.1%}  {count:>7} x  {key[:80]}")


def time_of(row: object, on_gpu: bool) -> float:
    """Microseconds of a kernel itself."""
    return float(getattr(row, "self_device_time_total" if on_gpu else "self_cpu_time_total"))

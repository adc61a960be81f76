"""Phases of the paper's iteration as the method's public code computes them, and ours.

144 images in groups of 12: LlamaGen's `generate` a group at a time; HPSv2 image by image, its
checkpoint read on every call, as its package does; one FID by `sqrtm` for each missing image. A few
calls of each are timed, and counted as often as an iteration makes them. Learning and publishing
count as ours on both sides.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from actors.decoding.steps import Workspace
from cluster.messages import Condition
from rewards.distribution.leave_one_out import leave_one_out_fid
from rewards.scorers.hpsv2 import HpsReward
from tests.bench.gpu.decoding import GUIDED
from tests.bench.gpu.scene import Scene
from tests.bench.gpu.scoring import PROMPT, features_of, hps, random_weights
from tests.bench.gpu.speed import run_of
from tests.bench.loo_fid import with_sqrtm
from tests.bench.measuring import Official, fastest, timed
from tests.parity import text_image

GROUP, GROUPS, TOGETHER = 12, 12, 8
DECAY = 0.9875


def public(scene: Scene) -> None:
    """Seconds of sampling, scoring and the distribution reward; with `step` and `weights` in the
    same process, of the whole."""
    ours, theirs = dict[str, float](), dict[str, float]()
    group = scene.size(GROUP, 1)
    ours["sample"], theirs["sample"] = sampling(scene, group)
    ours["score"], theirs["score"] = scoring(scene, group * GROUPS)
    ours["fid"], theirs["fid"] = distribution(scene, group * GROUPS)
    for name, seconds in ours.items():
        scene.figure(f"ours_{name}_s", seconds)
        if theirs[name]:
            scene.figure(f"theirs_{name}_s", theirs[name])
            scene.figure(f"public_{name}_ratio", theirs[name] / seconds)
    common = [scene.figures.get(name) for name in ("step_preset_s", "pack_s", "load_s")]
    if None in common or not theirs["sample"]:
        scene.note("the whole is not compared: it takes --official DIR, and step and weights")
        return
    both = sum(seconds for seconds in common if seconds)
    whole = (sum(theirs.values()) + both) / (sum(ours.values()) + both)
    scene.figure("public_whole_ratio", whole)


def sampling(scene: Scene, group: int) -> tuple[float, float]:
    """Twelve groups: eight and four decoded together; and one by one by the official code."""
    policy = scene.policy(torch.bfloat16)
    workspace = Workspace(policy)
    parts = (TOGETHER * group, (GROUPS - TOGETHER) * group)
    ours = sum(fastest([run_of(scene, n, workspace)], scene.device, 1)[0] for n in parts)
    if not scene.official or scene.tiny:
        return ours, 0.0
    official = Official(Path(scene.official), scene.small, policy)
    rows = torch.arange(group, device=scene.device)
    one = fastest([lambda: official.decode(rows, GUIDED.cfg_scale)], scene.device, 1)[0]
    return ours, one * GROUPS


def scoring(scene: Scene, count: int) -> tuple[float, float]:
    """HPSv2 in bf16, all images at once; and one image after reading the checkpoint."""
    side = scene.size(256, 48)
    pictures, asked = text_image.pictures(count, side, side), [Condition(text=PROMPT)] * count
    with random_weights(scene):
        scorer = hps(scene.device, "bf16", scene)
        ours = fastest([lambda: scorer(pictures, asked)], scene.device, 1)[0]
        single = hps(scene.device, "fp32", scene)
    model = single._model.model  # type: ignore[attr-defined]
    file = scene.folder() / "hps.pt"
    torch.save({"state_dict": model.state_dict()}, file)

    def one() -> None:
        state = torch.load(file, map_location=scene.device, weights_only=True)
        model.load_state_dict(state["state_dict"])
        score_one(single, pictures[:1], asked[:1], scene.device)

    return ours, fastest([one], scene.device, 2)[0] * count


def score_one(scorer: HpsReward, image: np.ndarray, asked: list[Condition], device: str) -> None:
    """Under fp16 autocast on a GPU, as the package has it; the text is read each time."""
    scorer._texts._kept.clear()
    with torch.autocast(device, torch.float16, enabled=device != "cpu"):
        scorer(image, asked)


def distribution(scene: Scene, count: int) -> tuple[float, float]:
    """Rewards in 2,048 dimensions on the CPU; and one FID by `sqrtm` for each missing image."""
    dim = scene.size(2048, 16)
    s = features_of(dim, count, 2 * dim, 2 * dim, 1e5)
    moments, reference = s.moments, s.reference
    _ = reference.factor
    left = moments.update(s.x[1:], DECAY)
    ours = fastest([lambda: leave_one_out_fid(s.x, moments, reference, DECAY)], "cpu", 1)[0]
    one = timed(lambda: with_sqrtm(left.mean, left.cov, reference), "cpu")
    return ours, one * (count + 1)

"""Check 10: a snapshot's way from learner to sampler on one card."""

from __future__ import annotations

import torch

from cluster.weights import Packer, load_weights
from tests.bench.gpu.scene import Scene
from tests.bench.measuring import fastest


def weights(scene: Scene) -> None:
    """Pack fp32 weights as bf16, into host memory and on the device; load them; compare."""
    learner, sampler = scene.policy(torch.float32), scene.policy(torch.bfloat16)
    config = learner.config.to_dict()
    kept = {name: tensor.clone() for name, tensor in sampler.state_dict().items()}
    pack, state = Packer(torch.bfloat16), learner.state_dict()
    host = pack(state, 1, config=config)
    scene.figure("snapshot_mib", host.nbytes / 2**20)
    for parameter in sampler.parameters():
        parameter.zero_()
    load_weights(sampler, host)
    scene.figure("loaded_same", same(sampler.state_dict(), kept))
    on_device = pack(state, 1, config=config, device=scene.device)
    scene.figure("manifests_same", float(on_device.manifest == host.manifest))
    for parameter in sampler.parameters():
        parameter.zero_()
    load_weights(sampler, on_device)
    scene.figure("loaded_on_device_same", same(sampler.state_dict(), kept))

    del host, on_device  # buffers are reused once nobody holds them
    runs = [
        lambda: pack(state, 2, config=config),
        lambda: pack(state, 2, config=config, device=scene.device),
    ]
    packed, on_device_s = fastest(runs, scene.device, 3)
    snapshot = pack(state, 2, config=config)
    loaded = fastest([lambda: load_weights(sampler, snapshot)], scene.device, 3)[0]
    scene.figure("pack_s", packed)
    scene.figure("pack_on_device_s", on_device_s)
    scene.figure("load_s", loaded)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return float(all(torch.equal(found[name], tensor) for name, tensor in expected.items()))

"""taming-transformers against outputs of the official code, fp32 on a CPU.

Two families of files: a whole Net2Net checkpoint (policy and VQGAN under prefixes), and a VQGAN's
own. A test that needs the policy skips the latter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.checkpoints.taming import (
    NET2NET,
    PERMUTER,
    VQGAN,
    TamingProject,
    parse_project,
    policy_tensors,
)
from actors.checkpoints.taming_vqgan import tokenizer_tensors
from actors.models.base import Conditions
from actors.models.permuters import ORDERS, inverse, permutation
from actors.models.taming import TamingGPT, coordinate_tokens
from actors.models.vq import VQDecoder, VQTokenizer
from cluster.messages import Condition
from cluster.model_files.tensors import load_strict
from tests.parity.compare import (
    check_close,
    check_codes,
    check_compared,
    check_distribution,
    check_greedy,
    check_images,
    check_levels,
    greedy_runs,
    sampling_specs,
)
from tests.parity.reference import TINY_WIDTH, Reference

FAMILY = "taming-"
FORWARD = "/forward_shuffle_idx"
TARGETS = {"taming-net2net": NET2NET, "taming-vqgan": VQGAN}


@dataclass(frozen=True)
class Loaded:
    """What a file describes, built and loaded."""

    project: TamingProject
    state: dict[str, Tensor]
    tokenizer: VQTokenizer
    gpt: TamingGPT | None

    @property
    def image_bound(self) -> float:
        """Tolerance of images and latents."""
        return 5e-5 if len(self.project.tokenizer.multipliers) <= 2 else 2e-4

    def codes(self, reference: Reference, name: str) -> Tensor:
        """(B, h, w) codes of an entry that is in the policy's order where there is one."""
        if self.gpt is None:
            return reference.tensor(name)
        return self.gpt.codes(reference.tensor(f"{name}_sequence_order"))


@pytest.fixture(scope="module")
def loaded(reference: Reference) -> Loaded:
    source = reference.path.name
    model = {"target": TARGETS[reference.config["family"]], "params": reference.model}
    project = parse_project(model, source)
    # Buffers are zeros in the references: a permuter's tables are not these.
    state = {
        name: tensor for name, tensor in reference.state().items() if not name.startswith(PERMUTER)
    }
    tokenizer = VQTokenizer(project.tokenizer)
    load_strict(tokenizer, tokenizer_tensors(state, source), source)
    gpt = None
    if project.policy is not None:
        gpt = TamingGPT(project.policy)
        load_strict(gpt, policy_tensors(state, project.policy, source), source)
        gpt.eval().requires_grad_(False)
    return Loaded(project, state, tokenizer.eval().requires_grad_(False), gpt)


@pytest.fixture(scope="module")
def policy(loaded: Loaded) -> TamingGPT:
    if loaded.gpt is None:
        pytest.skip("a VQGAN alone")
    return loaded.gpt


@pytest.fixture(scope="module")
def logits(policy: TamingGPT, reference: Reference) -> Tensor:
    """Teacher-forced, of the given tokens."""
    return policy(reference.tensor("tokens"), Conditions(reference.tensor("cond_tokens")))


def tolerance(policy: TamingGPT) -> float:
    return 3e-5 if policy.config.dim <= TINY_WIDTH else 2e-4


def test_logits(policy: TamingGPT, logits: Tensor, reference: Reference) -> None:
    picked = logits[:, reference.tensor("positions")][:, :, reference.tensor("columns")]
    check_close(picked, reference.tensor("tokens/logits_cond"), tolerance(policy), "logits")


def test_logsumexp_over_the_whole_vocabulary(
    policy: TamingGPT, logits: Tensor, reference: Reference
) -> None:
    expected = reference.tensor("tokens/lse_cond")
    check_close(logits.logsumexp(-1), expected, tolerance(policy), "logsumexp")


def test_logprobs_entropies_and_supports(
    policy: TamingGPT, logits: Tensor, reference: Reference
) -> None:
    rows, bound = list(sampling_specs(reference)), tolerance(policy)
    counts = [check_distribution(reference, "tokens", row, logits, bound)[0] for row in rows]
    least = 0.4 * reference.tensor("tokens").numel() * len(rows)
    check_compared(reference, sum(counts), least)


@torch.inference_mode()
def test_greedy_decoding_with_the_cache(policy: TamingGPT, reference: Reference) -> None:
    conditions = Conditions(reference.tensor("cond_tokens"))
    state = policy.allocate(len(conditions))
    columns = [policy.prefill(state, conditions).argmax(-1)]
    while len(columns) < policy.num_tokens:
        columns.append(policy.decode_step(state, columns[-1]).argmax(-1))
    tokens = torch.stack(columns, 1)
    compared = [check_greedy(reference, name, tokens) for name in greedy_runs(reference)]
    check_compared(reference, sum(compared), 1)


def test_condition_tokens(policy: TamingGPT, reference: Reference) -> None:
    given, config = reference.arrays["cond/input"], policy.config
    expected = reference.tensor("cond/tokens")
    if config.condition == "coordinates":
        coordinates = torch.from_numpy(given).float()
        found = coordinate_tokens(coordinates, config.coordinate_levels, config.coordinate_stride)
    else:
        classes = given if config.condition == "class" else [None] * len(expected)
        asked = [Condition(text="", class_index=index) for index in classes]
        found = policy.encode(asked).values
    assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def images(loaded: Loaded, reference: Reference) -> Tensor:
    return loaded.tokenizer(loaded.codes(reference, "decode/codes"))


def test_decoding_images(loaded: Loaded, images: Tensor, reference: Reference) -> None:
    check_images(reference, images, loaded.image_bound)


def test_levels(
    loaded: Loaded, images: Tensor, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.tokenizer, "forward", lambda _: images)
    check_levels(reference, loaded.tokenizer.pixels(loaded.codes(reference, "decode/codes")))


def test_codes_in_raster_order(policy: TamingGPT, loaded: Loaded, reference: Reference) -> None:
    codes = loaded.codes(reference, "decode/codes")
    assert torch.equal(codes, reference.tensor("decode/codes_raster"))


def given(reference: Reference) -> Tensor:
    return reference.tensor("encode/image_uint8").permute(0, 3, 1, 2) / 127.5 - 1


def test_latents(loaded: Loaded, reference: Reference) -> None:
    latents = loaded.tokenizer.encode_latents(given(reference))
    check_close(latents, reference.tensor("encode/latent"), loaded.image_bound, "latent")


def test_codes(loaded: Loaded, reference: Reference) -> None:
    codes = loaded.tokenizer.encode(given(reference))
    if loaded.gpt is None:
        check_codes(reference, codes, "encode/codes", "encode/margin")
    else:
        sure = loaded.gpt.tokens_of(reference.tensor("encode/margin_raster")) > 1e-3
        tokens = loaded.gpt.tokens_of(codes)
        assert torch.equal(tokens[sure], reference.tensor("encode/codes_sequence_order")[sure])


def test_the_decoding_half_is_the_same(loaded: Loaded, reference: Reference) -> None:
    decoder = VQDecoder(loaded.project.tokenizer)
    tensors = tokenizer_tensors(loaded.state, reference.path.name)
    load_strict(decoder, tensors, reference.path.name, ignore=VQDecoder.UNUSED)
    codes = loaded.codes(reference, "decode/codes")[:, :4, :4]
    assert torch.equal(decoder.eval()(codes), loaded.tokenizer(codes))


def test_permuters(reference: Reference) -> None:
    """Tables of taming's permuter classes by name and size. Others are skipped, by name: a file's
    own (`permuter/`), and those of no class that taming has."""
    tables = [name for name in reference.arrays if name.endswith(FORWARD)]
    unknown = []
    for table in tables:
        match = re.fullmatch(rf"permuters/(\w+)_(\d+)x\2{FORWARD}", table)
        if match is None or match[1] not in ORDERS:
            unknown.append(table)
            continue
        forward = permutation(match[1], int(match[2]))
        np.testing.assert_array_equal(forward, reference.arrays[table], err_msg=table)
        backward = table.replace("forward", "backward")
        if backward in reference.arrays:
            expected = reference.arrays[backward]
            np.testing.assert_array_equal(inverse(forward), expected, err_msg=backward)
    if unknown or not tables:
        pytest.skip(
            f"{reference.path.name}: tables that are not compared: {unknown or 'no tables'}"
        )

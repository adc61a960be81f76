"""The comparisons themselves, on files that are hard: ties, missing entries, own tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.distribution import log_distribution
from cluster.messages import SamplingSpec
from tests.parity.compare import SHIPPED, at_the_edge, check_compared, check_distribution
from tests.parity.reference import Reference, references

BOUND = 3e-5
TOKENS = np.arange(6, dtype=np.int32)[None]


def made(tmp_path: Path, spec: SamplingSpec, logits: Tensor, **changed: Any) -> Reference:
    """A file with what another implementation finds for the tokens 0 to 5, each given once at a
    position of the same logits (V,)."""
    given = torch.from_numpy(TOKENS).long()
    rows = logits.expand(1, 6, -1)
    logp, entropy = log_distribution(rows, spec)
    tables = {
        "logp": logp.gather(-1, given[..., None])[..., 0].numpy(),
        "entropy": entropy.numpy(),
        "support": (logp > -torch.inf).sum(-1).int().numpy(),
        "topk_gap": np.full((1, 6), np.nan),
        "nucleus_gap": np.full((1, 6), np.nan),
    } | changed
    arrays = {f"tokens/{name}": np.asarray(table)[None] for name, table in tables.items()}
    path = tmp_path / "made.npz"
    np.savez(path, config=np.array(json.dumps({"specs": []})), tokens=TOKENS, **arrays)
    return Reference(path)


def check(reference: Reference, spec: SamplingSpec, logits: Tensor) -> int:
    return check_distribution(reference, "tokens", (0, spec), logits.expand(1, 6, -1), BOUND)[0]


NUCLEUS = torch.tensor([0.6, 0.15, 0.15, 0.06, 0.03, 0.01]).log()
"""With top_p .7 the first two tokens stay: of the tied 1 and 2, either."""
EDGES = {
    "a tie at the edge of the nucleus": (SamplingSpec(top_p=0.7), NUCLEUS, (1, 2)),
    "a tie at the edge, at a temperature": (
        SamplingSpec(top_p=0.7, temperature=0.5),
        NUCLEUS * 0.5,
        (1, 2),
    ),
    "the same, of three tokens": (
        SamplingSpec(top_p=0.75),
        torch.tensor([0.55, 0.14, 0.14, 0.14, 0.02, 0.01]).log(),
        (1, 2, 3),
    ),
    "close, within the tolerance": (
        SamplingSpec(top_p=0.7),
        NUCLEUS + torch.tensor([0, 0, 2e-5, 0, 0, 0]),
        (1, 2),
    ),
    "close at rank k": (
        SamplingSpec(top_k=2),
        torch.tensor([3.0, 2.0, 2.0 - 2e-5, 1.0, 0.5, 0.0]),
        (1, 2),
    ),
    "top-k, then a tie in the nucleus": (
        SamplingSpec(top_k=5, top_p=0.7),
        NUCLEUS,
        (1, 2),
    ),
}


@pytest.mark.parametrize(("spec", "logits", "tied"), EDGES.values(), ids=EDGES)
def test_which_of_tied_tokens_is_kept_is_undecided(
    tmp_path: Path, spec: SamplingSpec, logits: Tensor, tied: tuple[int, ...]
) -> None:
    """Another implementation may keep the others of them; everything else must agree."""
    reference = made(tmp_path, spec, logits)
    swapped = reference.arrays["tokens/logp"].copy()
    kept = [t for t in tied if np.isfinite(swapped[0, 0, t])]
    dropped = [t for t in tied if not np.isfinite(swapped[0, 0, t])]
    assert kept
    assert dropped
    swapped[0, 0, dropped[0]], swapped[0, 0, kept[0]] = swapped[0, 0, kept[0]], -np.inf
    other = made(tmp_path, spec, logits, logp=swapped[0])
    rows = logits.expand(1, 6, -1)
    edge = at_the_edge(rows, torch.from_numpy(TOKENS).long(), spec, BOUND)
    assert set(torch.nonzero(edge[0])[:, 0].tolist()) == set(tied)
    for case in (reference, other):
        assert check(case, spec, logits) == int(np.isfinite(swapped).sum()) - len(kept)


@pytest.mark.parametrize(("spec", "logits", "tied"), EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("wrong", ["kept", "dropped", "logp", "entropy", "support"])
def test_beside_ties_everything_must_agree(
    tmp_path: Path, spec: SamplingSpec, logits: Tensor, tied: tuple[int, ...], wrong: str
) -> None:
    reference = made(tmp_path, spec, logits)
    table = "logp" if wrong in ("kept", "dropped") else wrong
    values = reference.arrays[f"tokens/{table}"][0].copy()
    if wrong == "kept":  # that lies far outside
        values[0, 5] = -3.0
    elif wrong == "dropped":
        values[0, 0] = -np.inf
    else:
        values[0, 0] += 1 if wrong == "support" else 1e-3
    with pytest.raises(AssertionError):
        check(made(tmp_path, spec, logits, **{table: values}), spec, logits)


def test_a_token_farther_from_the_edge_than_the_tolerance_is_decided(tmp_path: Path) -> None:
    spec, logits = SamplingSpec(top_k=2), torch.tensor([3.0, 2.0, 2.0 - 1e-4, 1.0, 0.5, 0.0])
    reference = made(tmp_path, spec, logits)
    swapped = reference.arrays["tokens/logp"][0].copy()
    swapped[0, 1], swapped[0, 2] = swapped[0, 2], swapped[0, 1]
    assert check(reference, spec, logits) == 2
    with pytest.raises(AssertionError):
        check(made(tmp_path, spec, logits, logp=swapped), spec, logits)


def test_without_a_filter_no_token_is_at_an_edge() -> None:
    logits = torch.zeros(1, 6, 6)
    assert not at_the_edge(logits, torch.from_numpy(TOKENS).long(), SamplingSpec(), 1.0).any()


def test_nothing_but_ties_is_skipped_by_name(tmp_path: Path) -> None:
    spec, logits = SamplingSpec(top_p=0.5), torch.zeros(6)
    reference = made(tmp_path, spec, logits)
    with pytest.raises(pytest.skip.Exception, match=r"made\.npz: nothing is decided"):
        check_compared(reference, check(reference, spec, logits), 1)


@pytest.mark.parametrize("name", ["mine.npz", "MINE.NPZ"])
def test_what_would_be_left_out_is_an_error(name: str, tmp_path: Path) -> None:
    """A folder without files, a file of another kind or family; capitals are none."""
    for folder in (tmp_path, tmp_path / "nowhere", SHIPPED / "llamagen_vq_tiny.npz"):
        with pytest.raises(pytest.UsageError, match=r"expected a folder with \.npz files"):
            references(folder, "llamagen-vq")
    file = tmp_path / name
    variation("llamagen_vq_tiny", tmp_path / "written.npz")
    (tmp_path / "written.npz").rename(file)
    assert [found.path for found in references(tmp_path, "llamagen-vq")] == [file]
    assert references(tmp_path, "llamagen-gpt") == []
    other = {"config": np.array(json.dumps({"family": "var"}))}
    for arrays in (other, {"mu": TOKENS}, {"config": np.array("x")}, {"config": np.array("[]")}):
        with file.open("wb") as stream:
            np.savez(stream, **arrays)
        with pytest.raises(pytest.UsageError, match=f"{name}: expected a file of reference"):
            references(tmp_path, "llamagen-gpt")
    file.write_text("<html>")
    with pytest.raises(pytest.UsageError, match=f"{name}: expected a file of reference"):
        references(tmp_path, "llamagen-gpt")


def variation(source: str, target: Path, drop: str = "", **changes: np.ndarray) -> None:
    """A shipped file without the entries that begin with `drop`, with others changed."""
    with np.load(SHIPPED / f"{source}.npz") as file:
        arrays = {n: file[n] for n in file.files if not drop or not n.startswith(drop)}
    np.savez(target, **arrays, **changes)


TABLE = np.arange(16, dtype=np.int32)


def test_any_file_of_the_format_can_be_tried(tmp_path: Path) -> None:
    """Own tables and missing entries are skipped by their names, and all else is compared; a wrong
    entry still fails."""
    own = {f"permuter/{way}_shuffle_idx": TABLE for way in ("forward", "backward")}
    variation("taming_tiny_cin", tmp_path / "own.npz", **own)
    other = {f"permuters/Hilbert_4x4/{way}_shuffle_idx": TABLE for way in ("forward", "backward")}
    variation("taming_tiny_cin", tmp_path / "other.npz", "permuters/", **other)
    for drop in ("tokens/", "greedy", "encode/", "cond/", "decode/codes_raster", "cond_tokens"):
        variation("taming_tiny_cin", tmp_path / f"t-{drop.replace('/', '-')}.npz", drop)
    for drop in (
        "greedy_cfg2/tokens",
        "tokens_guided",
        "tokens/logits_cfg4",
        "labels",
        "positions",
        "tokens/support",
    ):
        variation("llamagen_tiny_c2i", tmp_path / f"l-{drop.replace('/', '-')}.npz", drop)
    for drop in ("decode/image_uint8", "decode/image_mean", "decode/", "encode/latent"):
        variation("llamagen_vq_tiny", tmp_path / f"v-{drop.replace('/', '-')}.npz", drop)
    with np.load(SHIPPED / "llamagen_tiny_c2i.npz") as file:
        wrong = file["tokens/entropy"] + 1e-3
    variation("llamagen_tiny_c2i", tmp_path / "wrong.npz", "tokens/entropy")
    with np.load(tmp_path / "wrong.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "wrong.npz", **arrays, **{"tokens/entropy": wrong})

    tests = [f"tests/parity/test_{name}.py" for name in ("llamagen", "taming", "vq")]
    command = [sys.executable, "-m", "pytest", *tests, f"--parity-data={tmp_path}", "-p"]
    done = subprocess.run(
        [*command, "no:cacheprovider", "-q", "-rsf"], capture_output=True, text=True, timeout=500
    )
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    assert len(failed) == 1, done.stdout
    assert "wrong]" in failed[0] or "wrong-" in failed[0] or "-wrong" in failed[0]
    skipped = "\n".join(line for line in lines if line.startswith("SKIPPED"))
    for named in (
        "own.npz: tables that are not compared: ['permuter/forward_shuffle_idx']",
        "other.npz: tables that are not compared: ['permuters/Hilbert_4x4/forward_shuffle_idx']",
        "t-cond_tokens.npz has no 'cond_tokens'",
        "l-labels.npz has no 'emb_mask'",
        "t-greedy.npz has none of {'greedy': ('greedy/tokens', 'greedy/margin')}",
        "l-tokens-support.npz has no 'tokens/support'",
        "v-decode-image_uint8.npz has no 'decode/image_uint8'",
    ):
        assert named in skipped, done.stdout

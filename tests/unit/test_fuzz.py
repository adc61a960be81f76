"""Damaged files: a clear error or what was good before, never another library's traceback."""

from __future__ import annotations

import ast
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import CheckpointError, ConfigError, DataError, TesseraError
from cluster.io.run_layout import MANIFEST, POLICY_FILE
from cluster.messages import MAIN_SPACE, SampleRequest
from cluster.model_files.tensors import read_config, read_tensors
from learner.checkpoints.checkpoint import GROUPS, restore
from learner.data.datasets import load_images
from learner.monitoring.metrics import read_metrics
from learner.monitoring.timeline import Trace
from learner.rollouts.codec import pack_group, unpack_group
from learner.rollouts.prefetch import Pipeline
from learner.runs import records
from learner.runs.run_dir import RunDirectory
from learner.training.learner import Learner
from learner.training.state_files import OPTIMIZER_FILE, STATE_FILE, LearnerState
from rewards.combine import Combiner, RewardTerm
from rewards.distribution.config import MomentsConfig
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference, read_stored, write_reference
from rewards.servers.moments_server import MomentsServer
from tests.fuzzing import damage
from tests.small_run import small_config
from tests.unit.checkpoint_cases import Kept
from tests.unit.helpers import scored_group
from tests.unit.learner_cases import batch_of, make, tiny_policy_file

ROOT = Path(__file__).parents[2]


def features(seed: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


def in_both(value: Any) -> dict[str, Any]:
    return {MAIN_SPACE: value, "clip": value}


def moments_server(kind: str = "ema") -> MomentsServer:
    """Of two spaces, of the same features."""
    term = MomentsConfig(decay=0.5, kind=kind)
    made = MomentsServer({MAIN_SPACE: term, "clip": term})
    real = Reference.from_features(features(0), "net")
    made.set_references(in_both(real), in_both("net"))
    return made


class Parts:
    """A learner and a moments server, as a fleet has them."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.moments = learner, moments_server()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kept, Parts]:
    """A run with two checkpoints of a real learner."""
    folder = tmp_path_factory.mktemp("fuzz")
    fleet = Parts(make(tiny_policy_file(folder)))
    fleet.moments.seed(in_both(features(1)))
    fleet.moments.refresh()
    made = Kept(folder / "run")
    for step in (1, 2):
        fleet.learner.step(batch_of(fleet.learner, step))
        given = in_both(features(step + 1))
        fleet.moments.commit(step, given, np.ones(40, bool), run="run")
        made.store.save(step, fleet, Combiner({"clip": RewardTerm()}), b"groups %d" % step)
        made.store.close()
    return made, fleet


NAMES = (POLICY_FILE, OPTIMIZER_FILE, STATE_FILE, "moments.msgpack", "rewards.msgpack", GROUPS)
PER_FILE = 15  # eight files: 120 of a checkpoint


@pytest.mark.parametrize("name", [*NAMES, "config.yaml", MANIFEST])
def test_a_damaged_file_means_the_checkpoint_before(
    kept: tuple[Kept, Parts], name: str, logged: list[str]
) -> None:
    made, _ = kept
    file = made.run.checkpoints / "step_000002" / name
    good = file.read_bytes()
    try:
        for case in range(PER_FILE):
            file.write_bytes(damage(good, case))
            logged.clear()
            newest = made.open().newest()
            assert newest is not None
            assert newest.step == 1, case
            assert "skipping checkpoint step_000002" in logged[0]
    finally:
        file.write_bytes(good)
    newest = made.open().newest()
    assert newest is not None
    assert newest.step == 2


def test_swapped_files_mean_the_checkpoint_before(kept: tuple[Kept, Parts]) -> None:
    """With each other, and with those of the checkpoint before: 6 * 5 / 2 + 7 cases."""
    made, _ = kept
    first, second = (made.run.checkpoints / f"step_00000{step}" for step in (1, 2))
    pairs = [(second / a, second / b) for i, a in enumerate(NAMES) for b in NAMES[:i]]
    pairs += [(second / name, first / name) for name in (*NAMES, MANIFEST)]
    for one, other in pairs:
        ours, theirs = one.read_bytes(), other.read_bytes()
        if ours == theirs:
            continue
        one.write_bytes(theirs)
        if other.parent == second:
            other.write_bytes(ours)
        try:
            newest = made.open().newest()
            assert newest is not None
            assert newest.step == 1, (one.name, other)
        finally:
            one.write_bytes(ours)
            other.write_bytes(theirs)


def outcome(read: Callable[[], object], errors: type[TesseraError]) -> object:
    """What was read, or the error; anything else fails the test."""
    try:
        return read()
    except errors as error:
        return error


def fuzz(
    good: bytes, read: Callable[[bytes], object], same: Callable[[object], bool], cases: int = 500
) -> None:
    """Every damage is refused, or means nothing."""
    assert same(read(good))
    refused = 0
    for case in range(cases):
        changed = damage(good, case)
        found = outcome(lambda changed=changed: read(changed), TesseraError)  # type: ignore[misc]
        refused += isinstance(found, TesseraError) and len(str(found)) > 20
        assert isinstance(found, TesseraError) or same(found), f"case {case} was read silently"
    assert refused > cases / 2


@pytest.mark.parametrize("kind", ["ema", "sliding"])
def test_states_of_a_moments_server(kind: str) -> None:
    server = moments_server(kind)
    server.seed(in_both(features(1)))
    server.refresh()
    server.commit(3, in_both(features(2)), np.ones(40, bool), run="run")
    good = server.state()

    def read(data: bytes) -> bytes:
        other = moments_server(kind)
        other.restore(data)
        return other.state()

    fuzz(good, read, lambda found: found == good)


def test_stored_moments() -> None:
    good = Moments.from_features(features(1)).to_bytes()
    fuzz(good, lambda data: Moments.from_bytes(data).to_bytes(), lambda found: found == good)


def test_anchors() -> None:
    made = Combiner({"clip": RewardTerm()})
    made.anchors = {"clip": 0.25}

    def read(data: bytes) -> object:
        other = Combiner({"clip": RewardTerm()})
        other.restore(data)
        return other.anchors

    fuzz(made.state(), read, lambda found: found == {"clip": 0.25})


def test_in_flight_groups() -> None:
    """Each group is read when a run begins; here it is packed into the pipeline's state."""
    import msgpack

    from cluster.io.checksum import add_checksum

    asked: SampleRequest = scored_group({"clip": [0.1, 0.2]}).rollouts.request
    packed = pack_group(scored_group({"clip": [0.1, 0.2]}))
    good = add_checksum(msgpack.packb([(3, 2, [packed])]))

    def read(data: bytes) -> object:
        pipeline = Pipeline(small_config(max_staleness=1), None)  # type: ignore[arg-type]
        pipeline.restore(data)
        ((iteration, version, groups),) = pipeline._restored
        return iteration, version, [pack_group(unpack_group(asked, each)) for each in groups]

    fuzz(good, read, lambda found: found == (3, 2, [packed]))
    for case in range(500):  # and by itself, without the seal: an error or a group
        outcome(lambda case=case: unpack_group(asked, damage(packed, case)), CheckpointError)  # type: ignore[misc]


def test_states_of_a_learner(kept: tuple[Kept, Parts], tmp_path: Path) -> None:
    folder = kept[0].run.checkpoints / "step_000002"
    expected = LearnerState.read(folder)

    def read(data: bytes) -> object:
        (tmp_path / STATE_FILE).write_bytes(data)
        return LearnerState.read(tmp_path)

    fuzz((folder / STATE_FILE).read_bytes(), read, lambda found: found == expected)


@pytest.mark.parametrize("name", [POLICY_FILE, OPTIMIZER_FILE])
def test_unverified_tensors(kept: tuple[Kept, Parts], tmp_path: Path, name: str) -> None:
    """A file of tensors has no checksum of its own (a checkpoint's manifest has it): what is read
    may be other numbers, but nothing else is raised."""
    made, fleet = kept
    folder = shutil.copytree(made.run.checkpoints / "step_000002", tmp_path / "copy")
    good = (folder / name).read_bytes()
    refused = 0
    for case in range(250):
        (folder / name).write_bytes(damage(good, case))
        for read in (
            lambda: read_config(folder / name),
            lambda: read_tensors(folder / name),
            lambda: fleet.learner.restore(folder),
        ):
            found = outcome(read, CheckpointError)
        refused += isinstance(found, CheckpointError)
    assert refused > 95
    newest = made.open().newest()
    assert newest is not None
    restore(newest, fleet, Combiner({"clip": RewardTerm()}))  # type: ignore[arg-type]


def reference_bytes(write: Callable[..., None]) -> bytes:
    stream = io.BytesIO()
    moments = Reference.from_features(features(0), "net")
    write(stream, mu=moments.mu, sigma=moments.sigma, fingerprint=np.array("net"), images=40)
    return stream.getvalue()


@pytest.mark.parametrize("packed", ["savez", "savez_compressed", "ours"])
def test_references(tmp_path: Path, packed: str) -> None:
    file = tmp_path / "reference.npz"
    if packed == "ours":
        reference = Reference.from_features(features(0), "net")
        extra = {"class_counts": np.arange(3), "joint_mu": np.zeros(2), "joint_sigma": np.eye(2)}
        write_reference(file, reference, images=40, extra=extra)
        good = file.read_bytes()
    else:
        good = reference_bytes(getattr(np, packed))

    def read(data: bytes) -> tuple[object, ...]:
        file.write_bytes(data)
        found = read_stored(file)
        counts = None if found.class_counts is None else found.class_counts.tolist()
        moments = found.reference
        return (
            moments.mu.tolist(),
            moments.sigma.tolist(),
            moments.fingerprint,
            found.images,
            counts,
        )

    expected = read(good)
    fuzz(good, read, lambda found: found == expected)


def test_images(tmp_path: Path) -> None:
    stream, pixels = io.BytesIO(), np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(stream, arr_0=pixels)

    def read(data: bytes) -> object:
        (tmp_path / "images.npz").write_bytes(data)
        return load_images(str(tmp_path / "images.npz")).tolist()

    fuzz(stream.getvalue(), read, lambda found: found == pixels.tolist())


def test_configuration_files(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), small_config())
    good, expected = run.config.read_bytes(), (small_config(), run.identity)

    def read(data: bytes) -> object:
        run.config.write_bytes(data)
        return run.read_config(), run.identity

    fuzz(good, read, lambda found: found == expected)
    for number in range(10):  # whole lines lost at the end: what is left is a configuration, too
        run.config.write_bytes(b"".join(good.splitlines(keepends=True)[: -1 - number]))
        with pytest.raises(ConfigError, match="cut short"):
            run.read_config()


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "evaluation.json"])
def test_metrics_that_a_checkpoint_has_digests_of(tmp_path: Path, name: str) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), small_config())
    rows = [{"iteration": i, "version": i + 1, "reward/clip": 0.1 * i} for i in range(6)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.evaluations.write_text("".join(json.dumps({"step": s, "fid": 2.5}) + "\n" for s in (2, 4)))
    run.write_evaluation({"base": {"fid": 1.5, "accuracy": 0.5}})
    recorded = records.digests(run, 4)
    good = (run.path / name).read_bytes()

    def read(data: bytes) -> object:
        (run.path / name).write_bytes(data)
        records.check(run, 4, recorded)
        return records.digests(run, 4)

    fuzz(good, read, lambda found: found == recorded)


def test_images_and_reports(tmp_path: Path) -> None:
    """A damaged timeline is gone on with, as far as it can be read; metrics are read or refused."""
    rows = [{"iteration": i, "version": i + 1} for i in range(6)]
    metrics = "".join(json.dumps(row) + "\n" for row in rows).encode()
    label = {"name": "thread_name", "ph": "M", "args": {"name": "a"}, "pid": 1, "tid": 1}
    trace = b"[\n" + b",\n".join([json.dumps(label).encode()] * 6) + b"\n]\n"
    for case in range(500):
        (tmp_path / "m").write_bytes(damage(metrics, case))
        outcome(lambda: read_metrics(tmp_path / "m"), DataError)
        (tmp_path / "t").write_bytes(damage(trace, case))
        Trace(tmp_path / "t", resume=True).close()
        json.loads((tmp_path / "t").read_text())


def test_nothing_is_unpickled() -> None:
    """No call in the packages that can run what a file says."""
    forbidden = {
        ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("cloudpickle", "loads"),
        ("cloudpickle", "load"), ("joblib", "load"), ("dill", "load"), ("dill", "loads"),
        ("marshal", "load"), ("marshal", "loads"), ("shelve", "open"), ("yaml", "load"),
        ("yaml", "unsafe_load"), ("yaml", "full_load"),
    }  # fmt: skip
    needed = {("np", "load"): ("allow_pickle", False), ("torch", "load"): ("weights_only", True)}
    seen = 0
    for package in ("actors", "cluster", "learner", "rewards"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                assert given.get("allow_pickle") is not True, (file, node.lineno)
                if not isinstance(node.func, ast.Attribute):
                    continue
                if not isinstance(node.func.value, ast.Name):
                    continue
                called = (node.func.value.id, node.func.attr)
                assert called not in forbidden, (file, node.lineno)
                if called in needed:
                    option, value = needed[called]
                    assert given.get(option) is value, (file, node.lineno, option)
                    seen += 1
    assert seen >= 6

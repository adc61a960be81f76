"""The history of one feature space, behind its distribution reward; every iteration counts once.

The history is an exponential average or a sliding window of an effective number of images
(`rewards.distribution.moments`), the option `window`.

Shapes: N images, D feature dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgpack
import numpy as np
from threadpoolctl import threadpool_limits

from cluster.clock import epoch
from cluster.errors import CheckpointError, DataError
from cluster.io.checksum import UNREADABLE, add_checksum, pack_array, unpack_array, verify_checksum
from cluster.spans import Span
from rewards.distribution.config import MomentsConfig
from rewards.distribution.diagnostics import (
    LAG_COMMITS,
    LAG_SHARE,
    bias_constant,
    class_statistics,
    lag_warning,
    short_window_warning,
)
from rewards.distribution.diagonal import diagonal_distance
from rewards.distribution.distribution_reward import DistributionReward
from rewards.distribution.history_basis import MaintainedBasis
from rewards.distribution.leave_one_out import leave_one_out_fid
from rewards.distribution.moments import Moments, SlidingWindow
from rewards.distribution.reference import Reference, distance_to_reference, features_to_reference


@dataclass(frozen=True)
class _Step:
    """An iteration's update of the history."""

    before: Moments
    """History before this batch."""
    share: float
    """The history's share of the mixture."""
    after: Moments | SlidingWindow
    """The updated history."""


@dataclass(frozen=True)
class Prepared:
    """A commit that is computed, and not yet made."""

    run: str
    answer: DistributionReward
    step: _Step | None
    """None: a repeated commit, which changes nothing."""
    used: np.ndarray
    """(N, D) features of the valid images."""


class SpaceHistory:
    """Holds reference and history.

    A commit is keyed by run and iteration: a repeated commit returns the stored result and changes
    nothing, so callers may retry, also after a `restore`. Its two halves, `prepare` and `accept`,
    let several spaces change together or not at all.

    Args:
        name: of the worker, in spans.
    """

    def __init__(self, config: MomentsConfig, name: str = "moments-server") -> None:
        self.name = name
        self._config = config
        self._reference: Reference | None = None
        self._bias_constant: float | None = None
        self._history: Moments | SlidingWindow | None = None
        self._run: str | None = None  # the run that the history is bound to
        self._key: tuple[str, int] | None = None  # the last commit
        self._answer: DistributionReward | None = None
        self._warned = False  # of a short window
        self._lagging = 0  # consecutive commits with a lagging history
        self._basis = MaintainedBasis()
        self._refreshed: tuple[Span, ...] = ()  # spans for the next result

    def set_reference(self, reference: Reference, fingerprint: str) -> None:
        """Set the real images' moments.

        Raises:
            DataError: another feature network, only variances for covariance=full, or another
                dimension than the history's.
        """
        if reference.diagonal and self._config.covariance == "full":
            raise DataError(
                f"{reference.source or 'the reference'} holds variances alone (sigma_diagonal), "
                "but covariance=full compares covariances: set the reward's covariance to "
                "diagonal, or take statistics with sigma"
            )
        if reference.fingerprint and reference.fingerprint != fingerprint:
            raise DataError(
                f"the reference was made with features {reference.fingerprint!r}, but the reward "
                f"servers use {fingerprint!r}: build the reference again with this network"
            )
        reference = replace(reference, fingerprint=fingerprint)
        if self._history is not None and self._history.effective_size:
            reference.check_dim(self._history.dim)
        self._reference, self._bias_constant = reference, None
        self._basis.change_reference()

    def seed(self, start: np.ndarray | Moments) -> float:
        """Start the history from features (N, D) or moments of the base policy's images; returns
        their FID.

        With N = 0 it starts empty and returns NaN: the first iteration is scored alone, and an
        exponential average is debiased while it fills up.

        Raises:
            DataError: another dimension than the reference's (also in `commit` and `restore`), or
                moments for a sliding window.
        """
        sliding, empty = self._config.kind == "sliding", False
        if isinstance(start, Moments):
            if sliding:
                raise DataError("a sliding window starts from features, not from moments")
            dim, moments = start.dim, start
        else:
            empty, dim = start.ndim == 2 and not len(start), start.shape[-1]
        if self._reference is not None and not empty:
            self._reference.check_dim(dim)
        self._run, self._key, self._answer, self._warned = None, None, None, False
        self._lagging = 0
        self._basis.start(None)
        with threadpool_limits(self._config.num_threads):
            if empty:
                self._history = SlidingWindow() if sliding else Moments.empty(dim)
                return float("nan")
            if not isinstance(start, Moments):
                moments = Moments.from_features(start)
            self._history = (
                SlidingWindow().push(start, len(start))
                if sliding and not isinstance(start, Moments)
                else moments
            )
            return self._fid(moments)

    def commit(
        self,
        iteration: int,
        features: np.ndarray,
        valid: np.ndarray,
        *,
        run: str = "",
        classes: np.ndarray | None = None,
    ) -> DistributionReward:
        """Compute the rewards of an iteration's images and add them to the history, once.

        Raises:
            DataError: as `prepare`.
        """
        return self.accept(self.prepare(iteration, features, valid, run=run, classes=classes))

    def prepare(
        self,
        iteration: int,
        features: np.ndarray,
        valid: np.ndarray,
        *,
        run: str = "",
        classes: np.ndarray | None = None,
    ) -> Prepared:
        """Compute the rewards of an iteration's images; changes nothing.

        Args:
            iteration: later than the last one, or the same.
            features: (N, D) float32.
            valid: (N,) bool; failed images are excluded from rewards and moments.
            run: the first commit after `seed` or `restore` binds the history to a run.
            classes: (N,) int, for the diagnostics by class.

        Raises:
            DataError: another run's history, an iteration out of order, a repetition with another
                number of images, a window shorter than the iteration, or fewer than two valid
                images.
        """
        start = epoch()
        classes = None if classes is None else np.asarray(classes)
        if (repeated := self._repeated(run, iteration, len(features))) is not None:
            return Prepared(run, repeated, None, features[:0])
        if self._history is None or self._reference is None:
            raise DataError("the moments server needs a reference and seeded moments first")
        used = features[valid]
        if len(used):  # D is unknown if all images failed
            self._reference.check_dim(features.shape[1])
        rewards = np.full(len(features), np.nan)
        # With one thread the last bits do not depend on the machine.
        with threadpool_limits(self._config.num_threads):
            step = self._step(self._history, used)
            rewards[valid], fid = self._rewards(self._reference, step, used)
            batch_fid = self._batch_fid(self._reference, used)
            size = step.after.effective_size
            bias, batch_bias = self._bias(size, fid), self._bias(len(used), batch_fid)
        statistics = {} if classes is None else class_statistics(rewards, classes)
        answer = DistributionReward(
            iteration=iteration,
            rewards=rewards,
            fid=fid,
            batch_fid=batch_fid,
            effective_size=size,
            version=self._key[1] + 1 if self._key else 0,
            bias=bias,
            batch_bias=batch_bias,
            positive_share=float((rewards[valid] > 0).mean()),
            spans=(*self._refreshed, Span(self.name, "moments", start, epoch())),
            **statistics,
        )
        return Prepared(run, answer, step, used)

    def accept(self, prepared: Prepared) -> DistributionReward:
        """Add a prepared commit to the history; the last half, which does not fail."""
        answer, step, used = prepared.answer, prepared.step, prepared.used
        if step is None:
            return answer
        answer = replace(answer, warnings=self._warnings(answer, len(used)))
        self._basis.record(used, step.share)
        self._history, self._answer, self._refreshed = step.after, answer, ()
        self._run, self._key = prepared.run, (prepared.run, answer.iteration)
        return answer

    def refresh(self) -> None:
        """Decompose the history if the old decomposition does not fit another batch like the last;
        call it between commits. Rewards depend on it only in their last digits."""
        history, reference = self._history, self._reference
        if not (self._decomposes and reference and isinstance(history, Moments) and history.weight):
            return
        start, last = epoch(), 0 if self._answer is None else len(self._answer.rewards)
        with threadpool_limits(self._config.num_threads):
            if self._basis.refresh(history, reference, last):
                self._refreshed = (Span(self.name, "decompose", start, epoch()),)

    @property
    def _decomposes(self) -> bool:
        """Whether rewards may come from an older decomposition."""
        config = self._config
        return (config.kind, config.covariance, config.method) == ("ema", "full", "exact")

    def state(self) -> bytes:
        """State for a checkpoint: the history, the last commit's key and result.

        Raises:
            DataError: there is no history yet.
        """
        if self._history is None:
            raise DataError("the moments server has no moments yet")
        run, iteration = self._key or ("", -1)
        fields: dict[str, Any] = {"iteration": iteration, "run": run}
        if isinstance(self._history, Moments):
            fields["moments"] = self._history.to_bytes()
        else:
            fields["window"] = [pack_array(batch) for batch in self._history.batches]
        if (basis := self._basis).base is not None:  # so that a resumed run continues bit for bit
            fields["base"] = basis.base.to_bytes()
            fields["pending"] = [pack_array(batch) for batch in basis.pending]
            fields["pending_share"] = basis.share
        if self._answer is not None:
            fields["answer"] = self._answer.packed()
        return add_checksum(msgpack.packb(fields))

    def restore(self, state: bytes) -> None:
        """Inverse of `state`; the next commit repeats the last one or is a later iteration.

        Raises:
            CheckpointError: damaged, or of the other kind of history.
        """
        try:
            fields = msgpack.unpackb(verify_checksum(state), strict_map_key=False)
            key = (fields.get("run", ""), int(fields["iteration"]))  # version 0.1 had no runs
            found = "sliding" if "window" in fields else "ema"
            history = _unpack_history(fields)
            kept = fields.get("answer")
            answer = DistributionReward.unpacked(kept) if kept is not None else None
            base = Moments.from_bytes(fields["base"]) if "base" in fields else None
            pending = tuple(unpack_array(batch) for batch in fields.get("pending", ()))
            pending_share = float(fields.get("pending_share", 0.0))
        except UNREADABLE as error:
            raise CheckpointError(f"this is no state of a moments server: {error}") from error
        if found != self._config.kind:
            raise CheckpointError(
                f"the stored history is of kind {found!r}, the configuration asks for "
                f"{self._config.kind!r}: go on with kind={found}"
            )
        if self._reference is not None and history.effective_size:
            self._reference.check_dim(history.dim)
        self._history, self._answer = history, answer
        self._basis.start(base if self._decomposes else None, pending, pending_share)
        self._run, self._key = None, key if key[1] >= 0 else None

    def _repeated(self, run: str, iteration: int, count: int) -> DistributionReward | None:
        """The stored result of a repeated commit; None for a new one."""
        if self._run is not None and self._run != run:
            raise DataError(
                f"the moments belong to run {self._run!r}, but run {run!r} commits to them: each "
                "run needs a moments server of its own"
            )
        if self._key is None or self._key[0] != run or iteration > self._key[1]:
            return None
        if iteration < self._key[1] or self._answer is None:
            raise DataError(
                f"iteration {iteration} comes after {self._key[1]} was committed: "
                "moments cannot go back"
            )
        if len(self._answer.rewards) != count:
            raise DataError(
                f"iteration {iteration} was committed with {len(self._answer.rewards)} images, "
                f"and comes again with {count}"
            )
        return self._answer

    def _step(self, history: Moments | SlidingWindow, used: np.ndarray) -> _Step:
        decay = self._config.decay_at(*used.shape)  # raises for a window that is too short
        if isinstance(history, Moments):
            share = history.history_share(decay)
            return _Step(history.normalised(), share, history.update(used, decay))
        after = history.push(used, self._config.effective_images(*used.shape))
        older = SlidingWindow(after.batches[:-1])
        if not older.batches:
            return _Step(Moments.empty(used.shape[1]), 0.0, after)
        return _Step(older.moments(), 1 - len(used) / after.effective_size, after)

    def _rewards(
        self, reference: Reference, step: _Step, used: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Rewards of the images (N, D), and the FID of their mixture with the history."""
        config = self._config
        if (served := self._basis.leave_one_out(used, step.share, reference)) is not None:
            return served
        rewards, fid = leave_one_out_fid(
            used,
            step.before,
            reference,
            step.share,
            covariance=config.covariance,
            method=config.method,
            mode=config.mode,
        )
        if config.mode == "loo_batch":  # which returns the batch's FID
            fid = self._fid(step.before.update(used, step.share))
        return rewards, fid

    def _bias(self, images: float, fid: float) -> float:
        if self._bias_constant is None and self._reference is not None:
            self._bias_constant = bias_constant(self._reference, self._config.covariance)
        return min((self._bias_constant or 0.0) / images, fid)

    def _warnings(self, answer: DistributionReward, batch: int) -> tuple[str, ...]:
        """Warnings that were not given yet."""
        found: list[str] = []
        if self._config.covariance == "full" and not self._warned and self._reference is not None:
            images = self._config.effective_images(batch, self._reference.dim)
            found.append(short_window_warning(images, self._reference))
        self._warned = True
        if self._lagging < LAG_COMMITS:  # else the warning was given
            self._lagging = self._lagging + 1 if answer.lag > LAG_SHARE * answer.fid else 0
            if self._lagging == LAG_COMMITS:
                found.append(lag_warning(answer.fid, answer.batch_fid))
        return tuple(text for text in found if text)

    def _batch_fid(self, reference: Reference, used: np.ndarray) -> float:
        if self._config.covariance == "full":  # without a decomposition
            return features_to_reference(used, reference)
        return self._fid(Moments.from_features(used))

    def _fid(self, moments: Moments) -> float:
        if self._reference is None:
            raise DataError("the moments server needs a reference first")
        full = self._config.covariance == "full"
        distance = distance_to_reference if full else diagonal_distance
        return distance(moments.mean, moments.cov, self._reference)


def _unpack_history(fields: dict[str, Any]) -> Moments | SlidingWindow:
    if "window" in fields:
        return SlidingWindow(tuple(unpack_array(batch) for batch in fields["window"]))
    return Moments.from_bytes(fields["moments"])

"""Fills the parts of kept samples: a policy's images sampled and scored on a fleet, or given ones
scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cluster.errors import DataError
from cluster.fleet import Fleet
from cluster.messages import Condition, GroupScores, SampleRequest, SamplingSpec, ScoredGroup
from learner.config import RunConfig
from learner.data.datasets import (
    ImageSet,
    has_captions,
    has_labels,
    image_captions,
    load_labels,
    open_images,
    together,
)
from learner.evaluation.held_out import GROUP, PANEL
from learner.evaluation.kept.samples import (
    CLASSES,
    CONDITIONS,
    ENTROPIES,
    FEATURES,
    PART,
    PLACES,
    SCORES,
    TOKENS,
    Arrays,
    KeptSamples,
)
from learner.loop import failures
from rewards.base import Images

Advance = Callable[[int], None]


def sample_missing(
    fleet: Fleet, requests: Sequence[SampleRequest], kept: KeptSamples, advance: Advance
) -> None:
    """Sample and score the images of all parts that are missing.

    Args:
        requests: of all images.
        advance: called with the number of further images.

    Raises:
        DataError: an image could not be scored.
        StopRequestedError: a stop was requested; complete parts are kept.
    """
    missing, numbers = kept.missing(), condition_numbers(requests)
    wanted = (requests[number] for part in missing for number in kept.parts[part])
    with closing(fleet.stream(wanted)) as stream:  # type: ignore[type-var]
        for part in missing:
            groups = list[ScoredGroup]()
            for _ in kept.parts[part]:
                groups.append(next(stream))
                advance(len(groups[-1].scores.errors))
            of_requests = [numbers[number] for number in kept.parts[part]]
            arrays = sampled_arrays(groups, of_requests)
            fleet.serve_while(lambda part=part, arrays=arrays: kept.write(part, arrays))  # type: ignore[misc]


def condition_numbers(requests: Sequence[SampleRequest]) -> list[int]:
    """The place of each request's condition among all; requests of one follow each other."""
    numbers, before = list[int](), None
    for request in requests:
        new = request.condition is not before
        numbers.append((numbers[-1] if numbers else -1) + new)
        before = request.condition
    return numbers


def sampled_arrays(groups: Sequence[ScoredGroup], conditions: Sequence[int]) -> Arrays:
    """The arrays of a part.

    Args:
        conditions: number of each group's condition.

    Raises:
        DataError: an image could not be scored.
    """
    rollouts = [group.rollouts for group in groups]
    entropies = [each.entropies.mean(1, dtype=np.float64) for each in rollouts]
    sizes = [len(each.tokens) for each in rollouts]
    arrays = {
        CONDITIONS: np.repeat(np.asarray(conditions, np.int64), sizes),
        TOKENS: np.concatenate([each.tokens for each in rollouts]),
        ENTROPIES: np.concatenate(entropies),
        **scored_arrays([group.scores for group in groups]),
    }
    classes = [each.request.condition.class_index for each in rollouts]
    if any(index is None for index in classes):
        return arrays
    return arrays | {CLASSES: np.repeat(np.asarray(classes, np.int64), sizes)}


def scored_arrays(scored: Sequence[GroupScores]) -> dict[str, np.ndarray]:
    """Features and scores of a part.

    Raises:
        DataError: an image could not be scored.
    """
    failed, images = failures(scored)
    if failed:
        raise DataError(f"the judge failed on {len(failed)} of {images} images: {failed[0]}")
    features = {
        FEATURES + space: np.concatenate([each.features[space] for each in scored])
        for space in scored[0].features
    }
    scores = {
        SCORES + name: np.concatenate([each.scores[name] for each in scored])
        for name in scored[0].scores
    }
    return features | scores


@dataclass(frozen=True)
class GivenImages:
    """A set of images to score.

    Where they have classes (`arr_1` of an .npz file) or, in a run on captions, captions, they are
    scored as samples of these are. Else only their features are known.
    """

    images: ImageSet
    classes: np.ndarray | None
    """(N,) int64; or indices into `texts`."""
    texts: tuple[str, ...] = ()
    """The images' distinct captions; empty for classes."""

    @cached_property
    def order(self) -> np.ndarray:
        """(N,) numbers of the images as they are scored: sorted by class, since a request has one.

        That of the file, if its images can be read in no other, as compressed ones.
        """
        source = self.images.images
        anywhere = isinstance(source, np.ndarray) or getattr(source, "random_access", False)
        if self.classes is None or not anywhere:
            return np.arange(len(self.images))
        return np.argsort(self.classes, kind="stable")

    @classmethod
    def open(cls, source: str, *, captions: bool = False) -> GivenImages:
        """
        Args:
            captions: of a run on captions, which has no classes.

        Raises:
            CheckpointError, DataError: no such images, or classes that cannot be read.
        """
        images = open_images(source)
        if captions:
            if not has_captions(source):
                return cls(images, None)
            texts, index = np.unique(image_captions(source), return_inverse=True)
            return cls(images, index.astype(np.int64), tuple(texts.tolist()))
        return cls(images, load_labels(source) if has_labels(images) else None)

    def sizes(self) -> list[int]:
        """Images of each request, at most `GROUP` of one class, in `order`."""
        count = len(self.images)
        if self.classes is None:
            return [min(PART, count - at) for at in range(0, count, PART)]
        ends = [*(np.flatnonzero(np.diff(self.classes[self.order])) + 1).tolist(), count]
        found, first = list[int](), 0
        for end in ends:
            found += [min(GROUP, end - at) for at in range(first, end, GROUP)]
            first = end
        return found

    def requests(self, config: RunConfig) -> list[SampleRequest]:
        """Requests that name the conditions of the images, one for each of `sizes`.

        Raises:
            DataError: the configuration has no such class.
        """
        if self.classes is None:
            return []
        every = config.conditions.conditions()
        by_class = {each.class_index: each for each in every}
        if self.texts:
            by_text = {each.text: each for each in every}
            named = enumerate(self.texts)
            by_class = {at: by_text[text] for at, text in named if text in by_text}
        requests, first = list[SampleRequest](), 0
        for group, size in enumerate(self.sizes()):
            image = int(self.order[first])
            index = int(self.classes[image])
            if index not in by_class:
                what = repr(self.texts[index]) if self.texts else f"class {index}"
                raise DataError(
                    f"{self.images.name}: {what} of image {image} is none of the "
                    f"{len(by_class)} conditions: name the preset of their classes"
                )
            requests.append(_request(config, by_class[index], group, size))
            first += size
        return requests


def _request(config: RunConfig, condition: Condition, group: int, size: int) -> SampleRequest:
    return SampleRequest(
        stream="given",
        iteration=0,
        group=group,
        condition=condition,
        num_rollouts=size,
        seed=config.seed,
        spec=SamplingSpec(),
        panel=PANEL,
    )


def score_missing(
    config: RunConfig, fleet: Fleet, given: GivenImages, kept: KeptSamples, advance: Advance
) -> None:
    """Score given images. Those of parts that are there are read past.

    Raises:
        DataError: an image cannot be read, or could not be scored.
        StopRequestedError: a stop was requested; complete parts are kept.
    """
    requests, sizes = given.requests(config), given.sizes()
    missing = set(kept.missing())
    images, first = _in_groups(given, sizes), 0
    for part, numbers in enumerate(kept.parts):
        groups = [next(images) for _ in numbers]  # a part in memory at a time
        count = sum(sizes[number] for number in numbers)
        places = given.order[first : first + count]
        first += count
        if part not in missing:
            continue
        if requests:
            pairs = ((requests[n], group) for n, group in zip(numbers, groups, strict=True))
            arrays = scored_arrays(list(fleet.score_images(pairs)))
            if not given.texts:
                index = [requests[number].condition.class_index for number in numbers]
                of_requests = np.asarray(index, np.int64)
                arrays[CLASSES] = np.repeat(of_requests, [sizes[number] for number in numbers])
        else:
            found = fleet.features(groups, PANEL)
            arrays = {FEATURES + space: values for space, values in found.items()}
        kept.write(part, {**arrays, PLACES: places})
        advance(count)


def _in_groups(given: GivenImages, sizes: Sequence[int]) -> Iterator[Images]:
    """Images in their order, in groups of these sizes."""
    each: Iterator[np.ndarray]
    if (np.diff(given.order) == 1).all():
        each = (image for batch in given.images.batches(GROUP) for image in batch)
    else:
        each = (given.images.image(int(number)) for number in given.order)
    for size in sizes:
        yield together([next(each) for _ in range(size)])

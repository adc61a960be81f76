"""Prompts of text-image scorers: a condition's text, or a class name in templates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError, DataError
from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.text_limits import LongCaptions

PLACE = "{}"
LONG_CAPTIONS = "prompts.long_captions"
TEMPLATE_SETS = {
    "openai-imagenet": "OPENAI_IMAGENET_TEMPLATES",
    "simple-imagenet": "SIMPLE_IMAGENET_TEMPLATES",
}
"""Option -> name in open_clip's zero-shot metadata."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Texts of a text-image scorer."""

    classes: Literal["condition", "imagenet"] = "condition"
    """Text of a class. condition: the condition's own text. imagenet: open_clip's ImageNet name of
    the condition's class_index."""
    templates: tuple[str, ...] = (PLACE,)
    """Sentences with {} for the text; features of several are averaged, as in zero-shot
    classification. openai-imagenet (80 sentences) or simple-imagenet (7) alone is open_clip's
    list."""
    long_captions: LongCaptions = "error"
    """What to do with texts of more tokens than the model reads. error: refused before a run
    starts; their images get no score. truncate: cut, as open_clip does."""

    def __post_init__(self) -> None:
        if not self.templates:
            raise ConfigError("templates must name at least one sentence, found none")
        if len(self.templates) == 1 and self.templates[0] in TEMPLATE_SETS:
            return
        for template in self.templates:
            if template.count(PLACE) != 1:
                raise ConfigError(
                    f"templates must each contain {PLACE} once, found {template!r}; the named "
                    f"lists ({', '.join(TEMPLATE_SETS)}) stand alone"
                )


class Prompts:
    """Maps a condition to its sentences."""

    def __init__(self, config: PromptConfig) -> None:
        self._names = _metadata("IMAGENET_CLASSNAMES") if config.classes == "imagenet" else None
        self._fill = _templates(config.templates)

    def __call__(self, condition: Condition) -> tuple[str, ...]:
        """One sentence a template.

        Raises:
            DataError: the text is empty, or the class has no name.
        """
        text = condition.text if self._names is None else self._name(condition.class_index)
        if not text.strip():
            raise DataError("the condition's text is empty, so there is nothing to compare with")
        return tuple(fill(text) for fill in self._fill)

    def _name(self, index: int | None) -> str:
        assert self._names is not None
        if index is None or not 0 <= index < len(self._names):
            raise DataError(
                f"unknown class {index}: prompts with classes 'imagenet' need conditions with a "
                f"class_index in 0..{len(self._names) - 1}"
            )
        return self._names[index]


def _templates(templates: tuple[str, ...]) -> list[Callable[[str], str]]:
    if templates[0] in TEMPLATE_SETS:
        return list(_metadata(TEMPLATE_SETS[templates[0]]))
    # Not str.format: a caption may contain braces.
    return [lambda text, t=template: t.replace(PLACE, text) for template in templates]  # type: ignore[misc]


def _metadata(name: str):  # type: ignore[no-untyped-def]
    """A list of open_clip's zero-shot metadata."""
    ensure_torchvision()
    import open_clip.zero_shot_metadata as metadata

    return getattr(metadata, name)

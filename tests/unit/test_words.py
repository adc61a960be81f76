"""Words of this program's own that its code and pages must not use: each has a standard term.

Identifiers, strings, comments and docstrings are searched alike: `turnBack` and `turn_back` are
"turn back". Add a word here in the commit that removes its last use.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("actors", "cluster", "learner", "rewards")
WORDS = {
    "asked after": "polled",
    "attend while": "serve while",
    "borne": "allowed",
    "by and by|round and round": "gradually; modulo",
    "cut back": "truncate",
    "drawings": "attempts",
    "edition|editions": "weight version, policy version",
    "exam|exams|examined": "evaluation, evaluate",
    "farewell": "exit message",
    "footprint": "preflight",
    "foreign code|foreign scorer": "user code, user reward",
    "goes ahead": "accepts newer",
    "idle pass|idle passes": "dummy pass",
    "keeper|keepers": "stateful roles, checkpoint store",
    "lightening|fall of lightening": "reweighting, trace drops",
    "nobody": "no worker, no one; name the thing",
    "on the way|on their way": "pending group, in flight",
    "peers": "data-parallel group",
    "pulse": "heartbeat",
    "seal|seals|sealed|unseal|unsealed": "add checksum, verify checksum",
    "steward": "autoscaler",
    "strike|struck": "inject a failure",
    "to be had": "available",
    "turn back|turned back": "recycle",
    "vouch|vouched|vouches": "digest",
    "whereabouts": "discovery file",
    "whoever": "the caller, the user; name the thing",
    "wish|wishes": "control request",
}
"""Words (alternatives of a regular expression, lower case) -> what to write instead."""
ALLOWED = {
    ("CHANGELOG.md", "exam"): "the old prefix of TensorBoard's evaluations",
    ("CHANGELOG.md", "exams"): "the old name of evaluations.jsonl",
    ("cluster/io/run_layout.py", "exams"): "the old name of evaluations.jsonl",
    ("learner/loggers/tensorboard.py", "exam"): "the old prefix of TensorBoard's evaluations",
    ("CHANGELOG.md", "edition"): "the entry that renames it",
    ("cluster/status.py", "edition"): "a key of --json in 0.1, kept for one release",
}
"""(file, word) -> why it stays: a file or an option of an earlier version that is still read."""


def product_files() -> list[Path]:
    found = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    found += [file for package in PACKAGES for file in (ROOT / package).rglob("*.md")]
    return sorted([*found, *ROOT.glob("*.md")])


def plain(text: str) -> str:
    """Lower case, the words of identifiers apart; lines stay as they are."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return apart.replace("_", " ").lower()


# A gap between two words may be the end of a comment's line.
PATTERN = re.compile(
    r"\b(?:" + "|".join(f"({words})" for words in WORDS).replace(" ", r"[\s#]+") + r")\b"
)


def found_words(text: str) -> list[tuple[int, str, str]]:
    """(line, word, what to write instead), of the words above."""
    text = plain(text)
    instead = list(WORDS.values())
    return [
        (
            text.count("\n", 0, match.start()) + 1,
            re.sub(r"[\s#]+", " ", match[0]),
            instead[(match.lastindex or 1) - 1],
        )
        for match in PATTERN.finditer(text)
    ]


def test_private_words_do_not_come_back() -> None:
    found = {
        (str(file.relative_to(ROOT)), word): f"{file.relative_to(ROOT)}:{line}: write {instead}"
        for file in product_files()
        for line, word, instead in found_words(file.read_text())
    }
    assert {hit: advice for hit, advice in found.items() if hit not in ALLOWED} == {}
    assert ALLOWED.keys() - found.keys() == set(), "exceptions that are not needed any more"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def read_whereabouts(): ...", ["whereabouts"]),
        ("class StopWish: ...", ["wish"]),
        ("UNSEALED = 1", ["unsealed"]),
        ("# the\n# wishes of", ["wishes"]),
        ("a sealing agent", []),
    ],
)
def test_the_test_sees_them(text: str, found: list[str]) -> None:
    assert [word for _, word, _ in found_words(text)] == found

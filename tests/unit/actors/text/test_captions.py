"""Captions of files as their tools write them: every caption once, or the reason and its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.text.captions import caption_conditions, load_captions, read_captions
from actors.text.features import features_of, read_caption_features, write_caption_features
from cluster.errors import DataError
from learner.data.captions import peek_captions
from learner.data.conditions import ConditionsConfig
from tests.file_rows import reads
from tests.fuzzing import check_reader

PLAIN = ["a cat", "ein Bär", "一只猫"]
ODD = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
"""Where str.splitlines breaks a line, and a text file has none."""
TRICKY = [
    '"G O" painted in thick letters',
    'the words "a, b" on a wall',
    "a dog, a cat",
    '"quoted"',
    "",
]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Text.


@reads("actors/README.md", "text, one caption a line (`.txt`)")
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old mac"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "marked"])
def test_lines_end_at_line_ends_alone(tmp_path: Path, end: str, mark: str) -> None:
    captions = [f"a{odd}b" for odd in ODD] + PLAIN + ["x\ty"]
    path = written(tmp_path, "c.txt", mark + end.join(captions) + end)
    assert read_captions(path) == captions
    assert [c.text for c in ConditionsConfig(captions=str(path)).conditions()] == captions


def test_blank_lines_and_ends_are_no_captions(tmp_path: Path) -> None:
    path = written(tmp_path, "c.TXT", "\n a cat \n\u2028\n \t \n\x0c\n\ufeffa dog\u3000\n\n")
    assert read_captions(path) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no caption"),
        (b"\n \n", "holds no caption"),
        ("a\nb\n".encode("utf-16"), "it is UTF-16; convert it, as with `iconv -f UTF-16"),
        ("a\nb\n".encode("utf-32"), "it is UTF-32"),
        ("a\nb\n".encode("utf-16-le"), "line 1 has a NUL byte"),
        (b"a\nb\x00c\n", "line 2 has a NUL byte"),
        ("a\nein Bär\n".encode("latin-1"), r"line 2 has byte 0xe4 .*iconv -f LATIN1"),
        (b"a\r\nb\r\n\xff", "line 3 has byte 0xff"),
        (b"\x1f\x8b\x08\x00", "a gzip file; unpack it first"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"\x80\x04]\x94.", "a pickle"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', "this is JSON Lines .* name it .jsonl"),
        ('["a", "b"]', "this is JSON"),
        ('[\n "a",\n "b"\n]', "this is JSON rather than text .* name it .json"),
        ("Prompt\tCategory\na\tb\n", "a table of 2 columns, separated by tabs, .* --column"),
        ("1.jpg#0\tA child\n1.jpg#1\tA girl\n", "begins with a line of names"),
        ("prompt,category\na cat,animals\n", "a table separated by commas .* name it .csv"),
        ("image,caption\n1.jpg,A child in red, running\n", "a table separated by commas"),
        ("id, caption\n1, a cat\n", "a table separated by commas"),
        ("caption\na cat\na dog\n", "a table of one column .* name it .csv"),
    ],
)
def test_files_that_are_not_text_are_refused(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = written(tmp_path, "c.txt", content)
    with pytest.raises(DataError, match=message) as caught:
        read_captions(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        ["a cat, a dog", "two birds, one tree"],  # commas, and no names above them
        ["a\tb"],
        ["[a room] with a view", "{braces}"],
        ["a text, of many", "one"],
        ["prompt, with commas", "a cat, a dog"],
        ["a caption, text", "the b, c"],
    ],
)
def test_ordinary_captions_are_no_tables(tmp_path: Path, lines: list[str]) -> None:
    assert read_captions(written(tmp_path, "c.txt", "\n".join(lines))) == lines


def test_other_places_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.txt", Path("/dev/null")):
        with pytest.raises(DataError, match="not a readable UTF-8 text file"):
            read_captions(path)
    with pytest.raises(DataError, match="--column 'x' is of tables"):
        read_captions(written(tmp_path, "c.txt", "a"), "x")


@pytest.mark.parametrize("name", ["c.parquet", "c.yaml", "c.PKL"])
def test_names_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    message = "not a readable Parquet file" if name == "c.parquet" else "of a kind not read here"
    with pytest.raises(DataError, match=f"{message}: expected text .* found a text file"):
        read_captions(written(tmp_path, name, "- a cat\n- a dog\n"))


def test_blank_lines_between_captions_are_counted(tmp_path: Path) -> None:
    (note,) = load_captions(written(tmp_path, "c.txt", "a\n\nb\n \t\nc\n\n\n")).notes
    assert "2 blank lines are skipped, the first is 2" in note
    assert load_captions(written(tmp_path, "d.txt", "a\nb\n\n")).notes == ()


def test_notes_say_what_was_chosen_and_what_is_there_twice(tmp_path: Path) -> None:
    found = load_captions(written(tmp_path, "c.lst", "a\nb\na\na\n"))
    assert found.texts == ["a", "b", "a", "a"]
    text, twice = found.notes
    assert "read as text, one caption a line" in text
    assert "2 of 4 captions are repetitions" in twice
    (note,) = load_captions(written(tmp_path, "c.tsv", "Prompt\tNote\na\tb\n")).notes
    assert "column 'Prompt' is read" in note


# Tables.


@reads("actors/README.md", "`PartiPrompts.tsv`, tables by tabs (`.tsv`)")
def test_parti_prompts(tmp_path: Path) -> None:
    """Unquoted, with prompts that begin with a quotation, and a line end at the end."""
    lines = ["Prompt\tCategory\tChallenge\tNote"]
    lines += [f"{prompt}\tArts\tBasic\t" for prompt in TRICKY[:3]] + [
        "42\tAbstract\tBasic\tNumbers"
    ]
    path = written(tmp_path, "PartiPrompts.tsv", "\n".join(lines) + "\n")
    assert read_captions(path) == [*TRICKY[:3], "42"]
    assert read_captions(path, "Challenge") == ["Basic"] * 4


def test_quoted_tables_by_tabs(tmp_path: Path) -> None:
    path = tmp_path / "q.tsv"
    rows = [["caption", "n"], ["two\nlines\tand a tab", "1"], ['say ""', "2"], ['"whole"', "3"]]
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    assert read_captions(path) == ["two\nlines\tand a tab", 'say ""', '"whole"']


@reads("actors/README.md", "DrawBench, tables by commas (`.csv`)")
def test_draw_bench(tmp_path: Path) -> None:
    path = tmp_path / "DrawBench.CSV"
    captions = [*TRICKY[:4], "two\r\nlines", "a\u2028b"]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["Prompts", "Category"], *([c, "Colors"] for c in captions)])
    assert read_captions(path) == captions
    assert read_captions(path, "Category") == ["Colors"] * 6


@reads("actors/README.md", "LlamaGen's `coco_captions.csv`")
def test_one_column_with_commas_that_are_not_quoted(tmp_path: Path) -> None:
    captions = ["A pizza, on a table", "Two giraffes in a room", ' A "Stop" sign, upside-down']
    path = written(tmp_path, "coco_captions.csv", "\n".join(["Prompt", *captions]) + "\n")
    assert read_captions(path) == [caption.strip() for caption in captions]
    by_tabs = "Prompt\tid\n" + "\n".join(f"{caption}\t7" for caption in captions)
    assert read_captions(written(tmp_path, "t.csv", by_tabs)) == [c.strip() for c in captions]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,category\na cat, black,animals\n", "line 2 has 3 fields, the header 2"),
        ("a.csv", 'prompt,n\n"open,1\n', "line 2: .*"),
        ("a.csv", "prompt;n\na;1\n", "separated by semicolons"),
        ("a.csv", "a cat,1\na dog,2\n", r"name it with --column .*there are 'a cat', '1'"),
        ("a.csv", "caption,text\na,b\n", "not clear what column"),
        ("a.csv", "prompt,prompt\na,b\n", "2 columns are called 'prompt'"),
        ("a.csv", "prompt,n\n,1\n", "column 'prompt', line 2: found '', not text"),
        ("a.csv", "prompt,n\n", "holds no caption"),
        ("a.tsv", "prompt\tn\na\n", "line 2 has 1 fields, the header 2"),
        ("a.tsv", "prompt,n\na,1\n", "separated by commas"),
        ("a.json", "{", "not readable as JSON"),
        ("a.json", "[" * 5000, "not readable as JSON"),
        ("a.json", "7", "a list of captions is expected, found a number"),
        ("a.json", "[]", "holds no caption"),
        ("a.json", '["a", {"prompt": "b"}]', "item 2 is an object"),
        ("a.json", '[["a"]]', "item 1 is a list"),
        ("a.json", '["a", ""]', "item 2: found '', not text"),
        ("a.json", '[{"prompt": 7}]', "column 'prompt', item 1: found 7, not text"),
        ("a.json", '[{"prompt": "a"}, {"text": "b"}]', "not clear what column"),
        ("a.json", '[{"prompt": "a"}, {"x": "b"}]', "item 2: found None"),
        ("a.json", '{"0": "a", "1": "b"}', "0 members are lists of captions"),
        ("a.json", '{"text": ["a"], "prompt": ["b"]}', "2 members are lists of captions"),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]', "has 'prompt' twice"),
        ("a.json", '["\\ud800"]', "half of a character"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not readable as JSON"),
        ("a.jsonl", '{"prompt": "a"}\n\n7\n', "line 3 is a number"),
        (
            "a.csv",
            "image,caption\n1.jpg,A child in red, running\n",
            "hold separators belong in quotes$",
        ),
    ],
)
def test_wrong_tables_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_captions(written(tmp_path, name, content))


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    content = {"a.tsv": "Prompt\tNote\na\tb\n", "a.csv": "Prompt,Note\na,b\n"}
    content["a.jsonl"] = '{"Prompt": "a", "Note": "b"}\n{"Prompt": "a", "Note": "b"}\n'
    for name, text in content.items():
        with pytest.raises(DataError, match=r"no column 'prompt': did you mean 'Prompt'.*'Note'"):
            read_captions(written(tmp_path, name, text), "prompt")
        assert read_captions(tmp_path / name, "Note")[0] == "b"
    pq.write_table(pa.table({"Prompt": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'x'"):
        read_captions(tmp_path / "a.parquet", "x")
    with pytest.raises(DataError, match="column 'n' holds int64, not text"):
        read_captions(tmp_path / "a.parquet", "n")


@reads("actors/README.md", "HPSv2's lists of prompts, other lists (`.json`)")
def test_lists_of_texts(tmp_path: Path) -> None:
    path = written(tmp_path, "anime.json", json.dumps(PLAIN, ensure_ascii=True, indent=1))
    assert read_captions(path) == PLAIN
    with pytest.raises(DataError, match="a list of texts has no column 'prompt'"):
        read_captions(path, "prompt")
    assert read_captions(written(tmp_path, "c.json", json.dumps({"prompt": PLAIN}))) == PLAIN


@reads("actors/README.md", "COCO's `captions_val2014.json`")
def test_coco(tmp_path: Path) -> None:
    coco = {
        "info": {"year": 2014},
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "licenses": [{"id": 1, "name": "by"}],
        "annotations": [{"image_id": 7, "id": at, "caption": c} for at, c in enumerate(PLAIN)],
    }
    path = written(tmp_path, "captions_val2014.json", json.dumps(coco))
    assert read_captions(path) == PLAIN
    assert read_captions(path, "file_name") == ["7.jpg"]


@reads(
    "actors/README.md",
    "GenEval's metadata, other JSON Lines (`.jsonl`, `.ndjson`)",
)
def test_gen_eval(tmp_path: Path) -> None:
    rows = [{"tag": "one", "include": [{"class": "cat", "count": 1}], "prompt": c} for c in PLAIN]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert read_captions(written(tmp_path, "evaluation_metadata.jsonl", lines)) == PLAIN
    for name in ("m.ndjson", "m.json"):  # what it is the content says
        assert read_captions(written(tmp_path, name, lines), "prompt") == PLAIN
    assert read_captions(written(tmp_path, "list.jsonl", json.dumps(rows))) == PLAIN
    one = written(tmp_path, "one.jsonl", '"a\u2028b"\n"c"\n')
    assert read_captions(one) == ["a\u2028b", "c"]
    single = written(tmp_path, "single.jsonl", lines.partition("\n")[0])
    assert read_captions(single) == PLAIN[:1]


@reads("actors/README.md", "Parquet with a column of texts")
def test_parquet_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "anything.PARQUET"
    table = pa.table({"URL": ["u"] * 3, "TEXT": pa.array(PLAIN).dictionary_encode()})
    pq.write_table(table, path)
    assert read_captions(path) == PLAIN
    assert [c.text for c in caption_conditions(path, "URL")] == ["u"] * 3
    other = path.rename(tmp_path / "named.txt")  # what it is the content says
    assert [c.text for c in caption_conditions(other)] == PLAIN
    pq.write_table(pa.table({"prompt": ["a", None]}), path)
    with pytest.raises(DataError, match="column 'prompt', row 1: found None"):
        read_captions(path)


@reads("actors/README.md", "Parquet with a column of texts and `features`")
def test_parquet_of_texts_with_features(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    features = [[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]]
    pq.write_table(pa.table({"prompt": ["a", "b"], "note": ["c", "d"], "features": features}), path)
    for column in ("", "prompt"):
        found = caption_conditions(path, column)
        assert [c.text for c in found] == ["a", "b"]
        np.testing.assert_array_equal(features_of(found[1]), features[1])
    assert [c.text for c in caption_conditions(path, "note")] == ["c", "d"]
    assert read_captions(path, "note") == ["c", "d"]


@reads("actors/README.md", "Parquet of `actors.captions`")
def test_parquet_of_features(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    rows = [np.full((n, 3), n, np.float32) for n in (1, 2, 3)]
    write_caption_features(path, PLAIN, rows)
    for condition, text, wanted in zip(caption_conditions(path), PLAIN, rows, strict=True):
        assert condition.text == text
        np.testing.assert_array_equal(features_of(condition), wanted)
    with pytest.raises(DataError, match="its features are those of column 'caption', not of 'x'"):
        caption_conditions(path, "x")


def test_a_runs_captions_take_a_column(tmp_path: Path) -> None:
    path = written(tmp_path, "t.tsv", "id\tmine\n1\ta cat\n")
    found = ConditionsConfig(captions=str(path), column="mine").conditions()
    assert [c.text for c in found] == ["a cat"]
    with pytest.raises(DataError, match=r"conditions\.column of a run"):
        ConditionsConfig(captions=str(path)).conditions()


def test_a_column_of_shapes_that_holds_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    for shape in (3, [1], [1, 0], ["1", "2"], None):
        table = {"caption": ["a"], "features": [[1.0, 2.0]], "shape": [shape]}
        pq.write_table(pa.table(table), path)
        with pytest.raises(DataError, match="column 'shape', row 0: found"):
            peek_captions(str(path))


# Damage.


def well_formed(found: object) -> bool:
    assert isinstance(found, list)
    return bool(found) and all(
        isinstance(text, str) and text.strip() == text != "" and text.encode() for text in found
    )


FUZZED = {
    "c.txt": "\n".join([*PLAIN, *TRICKY[:4]]),
    "c.tsv": "\n".join(["Prompt\tNote", *(f"{c}\tn" for c in [*PLAIN, *TRICKY[:4]])]),
    "c.csv": 'Prompts,n\n"two\nlines",1\n"say ""a, b""",2\nplain,3\n',
    "c.json": json.dumps([{"prompt": c, "n": [1, {"x": None}]} for c in PLAIN]),
    "coco.json": json.dumps({"images": [{"id": 1}], "annotations": [{"caption": "a"}] * 3}),
    "c.jsonl": "\n".join(json.dumps({"prompt": c}) for c in PLAIN),
}


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_text_is_refused_or_read(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, FUZZED[name])
    assert well_formed(read_captions(path))
    check_reader(path, read_captions, 500, good=well_formed)


@pytest.mark.parametrize("kind", ["ours", "texts", "lists"])
def test_damaged_parquet_is_refused_or_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.parquet"
    if kind == "ours":
        write_caption_features(path, PLAIN, [np.ones((2, 3), np.float32)] * 3)
    else:
        columns: dict = {"prompt": PLAIN, "n": [1, 2, 3]}
        if kind == "lists":
            columns["features"] = [[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]]
        pq.write_table(pa.table(columns), path)

    def read(file: Path) -> object:
        found = read_caption_features(file) if kind == "ours" else caption_conditions(file)
        rows = [features_of(condition) for condition in found]
        assert all(row is None or np.isfinite(row).all() for row in rows)
        return [condition.text for condition in found]

    check_reader(path, read, 500, good=lambda found: isinstance(found, list) and bool(found))
    check_reader(path, lambda file: peek_captions(str(file)).captions.texts, 200, good=well_formed)

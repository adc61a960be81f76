"""Each benchmark's files are read as its scripts read them, or refused with the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import DataError
from learner.evaluation.benchmarks.prompts import LONGEST_NAME, Prompt
from learner.evaluation.benchmarks.table import BENCHMARKS
from tests.unit.learner.evaluation.benchmarks.files import GENEVAL, MAKERS, PARTI, geneval


def read(name: str, path: Path) -> list[Prompt]:
    return BENCHMARKS[name].read(path)


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_every_benchmark_has_a_file_here() -> None:
    assert MAKERS.keys() == BENCHMARKS.keys()


def test_geneval(tmp_path: Path) -> None:
    found = read("geneval", geneval(tmp_path))
    assert texts(found) == [each["prompt"] for each in GENEVAL]
    assert [json.loads(prompt.record) for prompt in found] == GENEVAL
    assert [dict(prompt.tags)["tag"] for prompt in found] == [each["tag"] for each in GENEVAL]
    assert [prompt.number for prompt in found] == [0, 1, 2]


def test_dpg(tmp_path: Path) -> None:
    found = {prompt.name: prompt for prompt in read("dpg", MAKERS["dpg"](tmp_path))}
    assert found.keys() == {"0", "whoops12", "COCOval2014000000000285"}
    assert found["whoops12"].text == "A \u00fcber long text of two lines."
    assert {name: prompt.tags for name, prompt in found.items()} == {
        "0": (("source", "none"),),
        "whoops12": (("source", "whoops"),),
        "COCOval2014000000000285": (("source", "COCOval"),),
    }


def test_compbench_with_carriage_returns(tmp_path: Path) -> None:
    folder = MAKERS["t2i-compbench"](tmp_path)
    found = read("t2i-compbench", folder)
    assert [(each.part, each.number, each.text) for each in found] == [
        ("color", 0, "a green bench"),
        ("color", 1, "A red hat. And a dog"),
        ("complex", 0, "The red hat was on top."),
        ("complex", 1, "Big, bad"),
    ]
    assert texts(read("t2i-compbench", folder / "color_train.txt")) == ["not read"]
    assert texts(read("t2i-compbench", folder / "complex_val.txt")) == texts(found)[2:]


def test_hpsv2(tmp_path: Path) -> None:
    folder = MAKERS["hpsv2"](tmp_path)
    found = read("hpsv2", folder)
    assert [(each.part, each.number) for each in found] == [
        (style, at) for style in ("anime", "concept-art", "paintings", "photo") for at in (0, 1)
    ]
    assert found[2].text == "concept-art of a/b"
    assert found[2].tags == (("style", "concept-art"),)
    assert read("hpsv2", folder / "photo.json") == found[6:]


def test_partiprompts_are_not_quoted(tmp_path: Path) -> None:
    found = read("partiprompts", MAKERS["partiprompts"](tmp_path))
    assert texts(found)[1] == '"H E L L O" in thick letters'
    assert found[1].tags == (("category", "Illustrations"), ("challenge", "Writing & Symbols"))


def test_drawbench_as_table_and_as_hpsv2s_list(tmp_path: Path) -> None:
    found = read("drawbench", MAKERS["drawbench"](tmp_path))
    assert texts(found) == ["A red car.", "A red car, and a blue dog."]
    assert found[1].tags == (("category", "Conflicting"),)
    listed = tmp_path / "drawbench.json"
    listed.write_text(json.dumps(texts(found)))
    assert texts(read("drawbench", listed)) == texts(found)


def test_a_byte_order_mark_and_line_ends_change_nothing(tmp_path: Path) -> None:
    for name in ("geneval", "partiprompts", "drawbench"):
        path = MAKERS[name](tmp_path)
        before = read(name, path)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
        assert read(name, path) == before


def test_repeated_prompts_keep_their_place(tmp_path: Path) -> None:
    path = geneval(tmp_path)
    path.write_text(path.read_text() + path.read_text())
    assert [prompt.number for prompt in read("geneval", path)] == [0, 1, 2, 3, 4, 5]


LINE = json.dumps(GENEVAL[0])
LONG = "x" * (LONGEST_NAME + 1)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("geneval", "m.jsonl", f"{LINE}\na photo\n", r"line 2: expected a JSON .* 'a photo'"),
        ("geneval", "m.jsonl", f'{LINE}\n{{"prompt": "x"}}', "line 2: expected a JSON object"),
        ("geneval", "m.jsonl", '{"prompt": "x", "tag": "y", "include": ["z"]}', "line 1: expected"),
        ("geneval", "m.jsonl", PARTI, "line 1: expected a JSON object .* found 'Prompt"),
        ("geneval", "m.jsonl", f"{LINE}\n\n{LINE}", "line 2 is blank.* by the number of"),
        ("geneval", "m.jsonl", LINE.replace("a cup", "  "), "line 1: expected text, found '  '"),
        ("geneval", "m.jsonl", " \n", "found an empty file"),
        ("dpg", "m.txt", "x", "expected the folder dpg_bench/prompts .* found a file"),
        ("dpg", "prompts/a.b.txt", "x", "has a further dot: rename it"),
        ("dpg", "prompts/a.csv", "x", "one .txt file for each prompt, found 'a.csv' in it"),
        ("dpg", "prompts/a.txt", "\n", "the file: expected text"),
        ("t2i-compbench", "color_val.txt", "a dog\nthis and/or that", "line 2 holds '/'"),
        ("t2i-compbench", "color_val.txt", "a_dog", "line 1 holds '_'"),
        ("t2i-compbench", "color_val.txt", f"a dog\n{LONG}", r"line 2: .* 244 bytes .* found 245"),
        ("t2i-compbench", "color_val.txt", "a dog\n\na cat", "line 2 is blank"),
        ("t2i-compbench", "color_val.txt", PARTI, "line 1: expected a prompt, found JSON or a ta"),
        ("t2i-compbench", "colour.txt", "a dog", "expected a file of one category"),
        ("t2i-compbench", "prompts/other.txt", "a dog", "expected color_val.txt, .* found none"),
        ("hpsv2", "prompts/anime.json", "[]", r"found no concept-art.json in it"),
        ("hpsv2", "anime.json", '["a", ""]', "item 2: expected text, found ''"),
        ("hpsv2", "anime.json", '[{"prompt": "a"}]', "expected a JSON list of texts"),
        ("hpsv2", "anime.json", "a\nb", "not readable as JSON|line 1 is not readable"),
        ("hpsv2", "manga.json", '["a"]', "or one of these files, found another"),
        ("partiprompts", "p.tsv", "Prompt\tCategory\na\tb\n", "no column 'Challenge'.*there are"),
        ("partiprompts", "p.tsv", "Prompt\tCategory\tChallenge\n", "a header alone|no caption"),
        ("partiprompts", "p.tsv", "Prompt\tCategory\tChallenge\na\t\tc\n", "line 2, Category"),
        ("partiprompts", "p.txt", "a\n", "expected PartiPrompts.tsv, .* found a file that ends in"),
        ("drawbench", "d.csv", "Prompt,Category\na,b\n", "columns Prompts, Category: .*'Prompts'"),
        ("drawbench", "d.csv", "Prompts,Category\na,b,c\n", "line 2 has 3 fields, the header 2"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused(
    tmp_path: Path, name: str, file: str, content: str, message: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(name, path if path.parent == tmp_path else path.parent)
    assert str(path.parent if "prompts" in file else path) in str(caught.value)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_what_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"expected .* found nothing there|expected a file of one"):
        read(name, tmp_path / "absent.tsv")


def test_the_longest_prompt_that_fits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shape_val.txt"
    path.write_text("x" * LONGEST_NAME)
    (prompt,) = read("t2i-compbench", path)
    assert len(prompt.text) == 244


def test_text_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "color_val.txt"
    path.write_bytes("a dog\na caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match="line 2 has byte 0xe9"):
        read("t2i-compbench", path)

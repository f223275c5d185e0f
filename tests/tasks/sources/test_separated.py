"""CSV and TSV files as they are published: quotation marks, blank lines, encodings, line ends."""

import csv

import pytest

from prunekern.tasks import DataError
from prunekern.tasks.sources.readers import read
from prunekern.tasks.sources.separated import is_quoted


def rows(path, content, columns=("text", "label")):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(row.where.removeprefix(f"{path} "), *row.values) for row in read(path, columns)]


def test_quotation_marks_in_tsv_are_characters(tmp_path):
    """GLUE's files have them anywhere; pytext #376 and torchtext #612 had lines merged that begin and end with one."""
    lines = ['"good film', 'bad film"', 'a "b" c', '" whole "', '"']
    content = "text\tlabel\n" + "".join(f"{line}\t{n}\n" for n, line in enumerate(lines))
    found = rows(tmp_path / "a.tsv", content)
    assert found == [(f"line {n + 2}", line, str(n)) for n, line in enumerate(lines)]
    last = "label\ttext\n" + '0\t"good\n1\tbad"\n'  # the mark's end is the line's
    assert rows(tmp_path / "b.tsv", last) == [("line 2", '"good', "0"), ("line 3", 'bad"', "1")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_tsv_as_csv_writer_and_pandas_write_it(tmp_path, quoting):
    texts = ['say "hi"', "two\nlines", "tab\there", "plain", '"all"']
    for kept in (texts, texts[:1], texts[1:2], texts[2:3], [*texts[3:4], *texts[:1]]):
        with open(tmp_path / "a.tsv", "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", quoting=quoting)
            writer.writerows([("text", "label"), *((text, "x") for text in kept)])
        assert is_quoted(tmp_path / "a.tsv")
        found = [row.values for row in read(tmp_path / "a.tsv", ("text", "label"))]
        assert found == [[text, "x"] for text in kept]


def test_tsv_lines_with_too_few_fields(tmp_path):
    with pytest.raises(DataError, match=r"a\.tsv line 3: 1 fields, but the header names 2"):
        rows(tmp_path / "a.tsv", 'text\tlabel\n"x\t1\ny\n')
    with pytest.raises(DataError, match=r"a\.tsv line 2: 3 fields, but the header names 2"):
        rows(tmp_path / "a.tsv", "text\tlabel\nx\t1\t2\n")


@pytest.mark.parametrize("extension, between", [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_blank_lines_and_a_mark(tmp_path, extension, between, end, mark):
    lines = ["", f"text{between}label", "", "   ", f"x{between}1", "", f"y{between}2", "", ""]
    found = rows(tmp_path / f"a{extension}", mark + end.join(lines))
    assert found == [("line 5", "x", "1"), ("line 7", "y", "2")]


def test_columns_beside(tmp_path):
    """Excel's empty ones at the end, and names there twice that nobody asked for."""
    assert rows(tmp_path / "a.csv", "text,label,,\nx,1,,\n") == [("line 2", "x", "1")]
    assert rows(tmp_path / "a.tsv", "id\ttext\tid\tlabel\n7\tx\t8\t1\n") == [("line 2", "x", "1")]


def test_a_nul_is_a_character(tmp_path):
    assert rows(tmp_path / "a.csv", "text,label\nx\0y,1\n") == [("line 2", "x\0y", "1")]


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nx,1\n".encode("utf-16"), r"line 1: not UTF-8 but UTF-16; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00\x00", "line 1: not UTF-8 but an archive; unpack it"),
        (b"\x80", r"line 1: not UTF-8 \(invalid start byte\)"),
    ],
)
def test_what_is_no_utf8(tmp_path, extension, content, message):
    with pytest.raises(DataError, match=rf"a\{extension} {message}"):
        rows(tmp_path / f"a{extension}", content)


def test_utf16_without_its_mark_and_names_with_blanks(tmp_path):
    with pytest.raises(DataError, match=r"column 'text' is missing; there are 't\\x00e\\x00x"):
        rows(tmp_path / "a.csv", "text,label\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"column 'label' is missing; there are text, ' label'"):
        rows(tmp_path / "a.csv", "text, label\nx,1\n")
    with pytest.raises(DataError, match=r"column 'text' is missing; there are text;label"):
        rows(tmp_path / "a.csv", "text;label\nx;1\n")


def test_a_name_twice_in_a_json_object(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl line 2: not JSON \(the name 'label' is there twice\)"):
        rows(tmp_path / "a.jsonl", '{"text": "x", "label": 1}\n{"text": "x", "label": 1, "label": 2}\n')


def test_json_spread_over_lines(tmp_path):
    with pytest.raises(DataError, match=r"line 1: not JSON .*expected an object on every line"):
        rows(tmp_path / "a.jsonl", '{\n "text": "x",\n "label": 1\n}\n')


def test_what_is_no_ordinary_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match=r"a\.csv is no ordinary file"):
        next(iter(read(tmp_path / "a.csv", ("text",))))

"""Files of one word a line: tabs and blanks, comments, documents, and what is wrong named by its line."""

import pytest

from prunekern import tasks
from prunekern.tasks.sources.conll import read_conll


def rows(path, text):
    path.write_bytes(text.encode())
    return [tuple(row.values) for row in read_conll(path)]


def test_tabs_comments_and_documents(tmp_path):
    path = tmp_path / "a.conll"
    text = "\ufeff# a comment\n-DOCSTART-\tO\n\nEU\tB-ORG\nrejects\tO\n\n \n# text = x\n#\tO\nNew York\tB-LOC\n"
    assert rows(path, text) == [(["EU", "rejects"], ["B-ORG", "O"]), (["#", "New York"], ["O", "B-LOC"])]
    assert [row.where for row in read_conll(path)] == [f"{path} line 4", f"{path} line 9"]
    assert rows(path, "EU\tNNP\tB-ORG\r\nx\tNN\tO\r\n") == [(["EU", "x"], ["B-ORG", "O"])]


def test_blanks(tmp_path):
    """CoNLL 2003: four columns; a hash is a word; a blank that does not break stays in its word."""
    text = "-DOCSTART- -X- -X- O\n\nEU NNP  B-NP B-ORG\n# NN I-NP O\na\u00a0b NN I-NP O"
    assert rows(tmp_path / "a.txt", text) == [(["EU", "#", "a\u00a0b"], ["B-ORG", "O", "O"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EU\tO\nrejects\n", "line 2: one column only (got 'rejects'); expected a word, a tab and its tag"),
        ("EU\tO\nx\tNN\tO\n", "line 2: 3 columns, but the first line has 2"),
        ("EU\tO\nx\t\n", "line 2: tag is blank"),
        ("EU\tO\n\tO\n", "line 2: word is blank"),
        ("", "is empty"),
        ("\n \n-DOCSTART- O\n", "has no rows"),
    ],
)
def test_lines_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "a.conll"
    with pytest.raises(tasks.DataError) as caught:
        rows(path, text)
    assert message in str(caught.value) and "a.conll" in str(caught.value)


def test_not_utf8(tmp_path):
    (tmp_path / "a.conll").write_bytes(b"EU\tO\ncaf\xe9\tO\n")
    with pytest.raises(tasks.DataError, match=r"a\.conll line 2: not UTF-8"):
        list(read_conll(tmp_path / "a.conll"))
    with pytest.raises(FileNotFoundError, match=r"no\.conll does not exist"):
        list(read_conll(tmp_path / "no.conll"))

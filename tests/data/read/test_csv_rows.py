"""CSV files as spreadsheets and data frames write them are read as they were meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakeet.config import DataSettings
from lorakeet.data.read.formats import read_file
from lorakeet.data.rows.load import read_rows
from lorakeet.errors import DataError

Put = Callable[..., Path]

WANTED = [{"text": "hello", "label": "pos"}, {"text": "bye", "label": "neg"}]
SPREADSHEETS = {
    "plain": "text,label\nhello,pos\nbye,neg\n",
    "nameless columns at the end": "text,label,,\nhello,pos,,\nbye,neg,,\n",
    "the index of a data frame": ",text,label\n0,hello,pos\n1,bye,neg\n",
    "a nameless column with a note": "text,label,\nhello,pos,\nbye,neg,see below\n",
    "separators at the ends of rows alone": "text,label\nhello,pos,,\nbye,neg,\n",
    "blanks behind commas": "text, label\nhello, pos\nbye, neg\n",
    "blanks behind the commas of rows": "text,label\nhello, pos\nbye, neg\n",
    "blanks around names": " text , label \nhello,pos\nbye,neg\n",
    "a blank first line": "\n\ntext;label\nhello;pos\nbye;neg\n",
    "a first row without content": ",,\ntext,label,\nhello,pos,\nbye,neg,\n",
    "a stated separator": "sep=;\ntext;label\nhello;pos\nbye;neg\n",
    "a stated separator in quotes, CRLF": '\ufeff"sep=\t"\r\ntext\tlabel\r\nhello\tpos\r\nbye\tneg\r\n',
    "a quoted separator in the header": '"text";"label";"a, b, c, d"\nhello;pos;\nbye;neg;x\n',
    "bars": "text|label\nhello|pos\nbye|neg\n",
    "rows without content at the end": "text,label\nhello,pos\nbye,neg\n,\n,\n\n",
}


def rows(path: Path, task: Any = "SEQ_CLS", **columns: str) -> list[dict[str, Any]]:
    data = read_rows(DataSettings(path=str(path), columns=columns), task, seed=42).data
    return [dict(row) for row in data]


@pytest.mark.parametrize("name", SPREADSHEETS)
def test_what_spreadsheets_write(name: str, put: Put) -> None:
    assert rows(put("a.csv", SPREADSHEETS[name])) == WANTED


def test_a_quotation_mark_behind_a_blank(put: Put) -> None:
    path = put("a.csv", 'label, text\npos, "a, b"\nneg, "c, ""d"""\n')
    for columns in ({}, {"text": " text"}, {"text": "text"}):
        assert rows(path, **columns) == [{"text": "a, b", "label": "pos"}, {"text": 'c, "d"', "label": "neg"}]


def test_a_blank_that_is_part_of_a_text_stays(put: Put) -> None:
    assert rows(put("a.csv", "text,label\n hello,pos\nbye ,neg\n")) == [
        {"text": " hello", "label": "pos"},
        {"text": "bye ", "label": "neg"},
    ]


def test_the_whole_line_is_never_the_text(put: Put) -> None:
    path = put("a.csv", "\ntext;author\nhello, you;me\nbye;you\n")
    assert rows(path, "CAUSAL_LM") == [{"text": "hello, you"}, {"text": "bye"}]
    assert rows(put("a.tsv", "text, whole\tn\na, b, c\t1\n"), "CAUSAL_LM") == [{"text": "a, b, c"}]


def test_nameless_columns_keep_what_they_hold(put: Put) -> None:
    found = [record.values for record in read_file(put("a.csv", "text,,\nhello,,x\nbye,,\n"))]
    assert found == [{"text": "hello", "Unnamed: 2": "x"}, {"text": "bye"}]


def test_rows_without_content_in_the_middle_are_counted(put: Put) -> None:
    found = [(record.location.number, record.values) for record in read_file(put("a.csv", "\na,b\n1,2\n,\n3,\n,\n"))]
    assert found == [(3, {"a": "1", "b": "2"}), (4, {"a": "", "b": ""}), (5, {"a": "3", "b": ""})]


def test_lines_are_counted_from_the_top_of_the_file(put: Put) -> None:
    path = put("a.csv", 'sep=;\n\ntext;n\n"one\nand on";1\ntwo;2;3\n')
    assert [record.location.number for record in read_file(path)] == [4, 6]


@pytest.mark.parametrize("header", ["text,label,text", "text, text,label", '"text",text ,label'])
def test_a_name_given_twice_is_refused(header: str, put: Put) -> None:
    with pytest.raises(DataError, match="line 2: a header with the same name twice: text"):
        rows(put("a.csv", f"\n{header}\na,b,c\n"))

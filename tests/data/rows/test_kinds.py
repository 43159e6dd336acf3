"""The registry of kinds: a kind added by one registration, and one rule for which rows are usable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor.examine import examine
from lorakeet.data.doctor.issues import PROBLEMS
from lorakeet.data.encode.encoder import Batch, Encoder, Sample, ids_type
from lorakeet.data.prepare import prepare
from lorakeet.data.rows.kinds import Column, Kind, Roles, all_kinds, find_kind, register, role, unregister
from lorakeet.data.rows.load import read_rows, usable
from lorakeet.errors import DataError

Put = Callable[..., Path]


def jsonl(*records: Any) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


@dataclass(frozen=True)
class PreferenceEncoder(Encoder):
    """Token ids of the prompt with each of two answers."""

    def model_columns(self) -> dict[str, Any]:
        return {"input_ids": ids_type(), "negative_ids": ids_type()}

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        pairs = zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True)
        for number, (prompt, chosen, rejected) in enumerate(pairs):
            good, bad = self.tokens([prompt + chosen, prompt + rejected])["input_ids"]
            sample = {"input_ids": good, "negative_ids": bad, "length": len(good), "targets": len(good), "cut": False}
            yield number, sample


PREFERENCE = Kind(
    "preference",
    roles=(Roles({name: role(name) for name in ("prompt", "chosen", "rejected")}),),
    columns=(Column("prompt", may_be_empty=True), Column("chosen"), Column("rejected", in_content=False)),
    normalize=None,
    encoders={
        "CAUSAL_LM": lambda layout, task, settings, tokenizer, labels: PreferenceEncoder(tokenizer, settings.max_length)
    },
)


@pytest.fixture
def preference() -> Iterator[Kind]:
    yield register(PREFERENCE)
    unregister("preference")


RECORDS = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"not {n}"} for n in range(20)]
UNUSABLE = [{"prompt": "Say", "chosen": " ", "rejected": "b"}, {"prompt": "Say", "chosen": "a", "rejected": None}]


@pytest.mark.usefixtures("preference")
@pytest.mark.parametrize("stream", [False, True])
def test_a_new_kind_needs_one_registration(put: Put, byte_tokenizer: PreTrainedTokenizerFast, stream: bool) -> None:
    path = put("a.jsonl", jsonl(*RECORDS, *UNUSABLE))
    data, task = DataSettings(path=str(path), stream=stream, eval_fraction=0.2), TaskSettings(type="CAUSAL_LM")
    rows = read_rows(data, "CAUSAL_LM")
    assert rows.layout.kind == "preference" and list(rows.data)[:20] == RECORDS
    found = examine(data, task)
    assert (found.kind, found.rows, found.usable) == ("preference", 22, 20)
    assert {group.code for group in found.issues} == {"empty", "null"}
    assert examine(data, task, byte_tokenizer).lengths.figures()["longest"] == len("Say 19.") + len("19")
    prepared = prepare(data, task, byte_tokenizer, seed=0)
    held_out = prepared.held_out
    assert prepared.report.kind == "preference" and held_out is not None and len(held_out) >= 1
    samples = [*prepared.train, *held_out]
    assert sorted(byte_tokenizer.decode(sample["input_ids"]) for sample in samples) == sorted(
        record["prompt"] + record["chosen"] for record in RECORDS
    )
    assert all("not" in byte_tokenizer.decode(sample["negative_ids"]) for sample in samples)


@pytest.mark.usefixtures("preference")
def test_a_new_kind_is_checked_like_the_others(put: Put) -> None:
    bad = [{**RECORDS[0], "rejected": "caf\u00c3\u00a9"}, {**RECORDS[1], "chosen": 7}, RECORDS[3]]
    path = put("a.jsonl", jsonl(*RECORDS, *bad))
    found = examine(DataSettings(path=str(path)), TaskSettings(type="CAUSAL_LM"))
    assert {group.code: group.count for group in found.issues} == {
        "mojibake": 1, "wrong_type": 1, "duplicate": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"line 22: column 'chosen' holds int"):
        read_rows(DataSettings(path=str(path)))
    path = put("b.jsonl", jsonl({"prompt": "a", "choosen": "b", "rejected": "c"}))
    with pytest.raises(DataError) as caught:
        read_rows(DataSettings(path=str(path), columns={"prompt": "prompt", "rejected": "rejected"}))
    assert caught.value.hint == "say which column is what: data.columns.chosen=choosen"


@pytest.mark.usefixtures("preference")
def test_a_name_is_registered_once() -> None:
    assert find_kind("preference") is PREFERENCE and all_kinds()[0] is PREFERENCE
    with pytest.raises(ValueError, match="'preference' already"):
        register(PREFERENCE)


TEXTS = st.sampled_from(["a", "b c", "", " \n", None])
TURNS = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
ANSWERS: list[Any] = [{"text": ["me"], "answer_start": [7]}, {"text": [], "answer_start": []}, None]
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.sampled_from([TURNS, json.dumps(TURNS), [], "", None]),
    "conversations": st.sampled_from([TURNS, [], None]),
    "tools": st.sampled_from([None, "", [{"name": "f"}]]),
    "label": st.sampled_from([0, 1, None]),
    "tokens": st.sampled_from([["a", "b"], ["", "b"], [], None]),
    "tags": st.sampled_from([["X", "Y"], [], None]),
    "context": st.sampled_from(["It was me.", " ", None]),
    "answers": st.sampled_from(ANSWERS),
    "answer_start": st.none(),
}
WHOLE: dict[str, Any] = {
    "messages": TURNS, "conversations": TURNS, "tools": None, "label": 1, "tokens": ["a", "b"], "tags": ["X", "Y"],
    "context": "It was me.", "answers": ANSWERS[0], "answer_start": None,
}  # fmt: skip
FORMS = [(kind.name, number) for kind in all_kinds() for number in range(len(kind.roles))]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(FORMS), data=st.data())
def test_doctor_and_prepare_count_the_same_usable_rows(put: Put, form: tuple[str, int], data: st.DataObject) -> None:
    kind = find_kind(form[0])
    roles = kind.roles[form[1]]
    lists = {"prompt": TURNS} if kind.name == "messages" and "prompt" in roles.all else {}
    whole = {name: {**WHOLE, **lists}.get(name, "a") for name in roles.all}
    values = {name: VALUES.get(name, TEXTS) for name in roles.all}
    optional = data.draw(st.sets(st.sampled_from(sorted(roles.optional))) if roles.optional else st.just(set()))
    drawn = data.draw(st.lists(st.fixed_dictionaries({}, optional=values), max_size=6))
    left_out = roles.optional.keys() - optional
    records = [{name: record[name] for name in record.keys() - left_out} for record in [whole, whole, *drawn]]
    assert_same_count(put("a.jsonl", jsonl(*records)), kind)


@pytest.mark.parametrize(
    ("name", "records", "usable"),
    [
        ("pairs", [{"anchor": "a", "positive": "b", "negative": value} for value in ("c", None, " ", "")], 1),
        ("classes", [{"text": "a", "text_pair": value, "label": 1} for value in ("c", None, "", " ")], 3),
    ],
)
def test_a_second_text_that_is_null_makes_a_row_unusable(
    put: Put, name: str, records: list[dict[str, Any]], usable: int
) -> None:
    assert assert_same_count(put("a.jsonl", jsonl(*records)), find_kind(name)) == usable


def assert_same_count(path: Path, kind: Kind) -> int:
    """Compare the doctor's count with the rows that prepare uses, and return it."""
    task = next(iter(kind.encoders))
    given = DataSettings(path=str(path))
    found = examine(given, TaskSettings(type=task), samples=0)
    try:
        rows = read_rows(given, task)
    except DataError:
        assume(False)
    assert rows.layout.kind == kind.name
    assert found.usable == len(usable(rows.data, kind.name))
    return found.usable


def test_every_column_of_every_kind_is_made_and_every_code_is_known() -> None:
    for kind in all_kinds():
        names = [column.name for column in kind.columns]
        assert len(set(names)) == len(names) and kind.content_columns() and (kind.labels or names[0]) in names
    assert {"unreadable", "broken", "encoding", "wrong_type", "half_character", "tag_count", "answer_place"} <= set(
        PROBLEMS
    )

"""Streams: every row once a pass, another order each pass, held-out texts nowhere in it, and memory that stays flat."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from lorakeet.config import DataSettings
from lorakeet.data.rows.load import Rows, read_rows
from lorakeet.data.rows.split import normalized
from lorakeet.data.rows.stream import LOCATION, held_out_rows, rest_of, stream_rows
from lorakeet.errors import DataError

Put = Callable[..., Path]


@pytest.fixture
def folder(put: Put) -> Path:
    """Three files of 400 rows each; each text stands in the first file and, otherwise spaced and cased, in the last."""
    for name in range(3):
        form = "row {} of {}" if name < 2 else "ROW  {} of {}"
        texts = [form.format(number, name % 2) for number in range(400)]
        path = put(f"all/{name}.jsonl", "\n".join(json.dumps({"text": text, "label": name}) for text in texts))
    return path.parent


def settings_of(path: Path | list[str], **more: Any) -> DataSettings:
    values = {"stream": True, "shuffle_buffer": 200, "eval_fraction": 0.0, **more}
    return DataSettings(path=path if isinstance(path, list) else str(path), **values)


def texts_of(stream: datasets.IterableDataset) -> list[str]:
    return [row["text"] for row in stream]


def places_of(rows: Rows) -> list[str]:
    return list(map(str, rows.locations))


def test_a_pass_has_every_row_once_in_random_order(folder: Path) -> None:
    settings = settings_of(folder)
    stream = stream_rows(settings, "CAUSAL_LM", 0)
    rows, whole = list(stream), read_rows(settings)
    places = places_of(whole)
    assert Counter(row[LOCATION] for row in rows) == Counter(places)
    assert {row[LOCATION]: row["text"] for row in rows} == dict(zip(places, whole.data["text"][:], strict=True))
    assert [row[LOCATION] for row in rows] != places
    assert stream.info.description.endswith("(3 files, jsonl), text in column 'text', streamed")
    assert stream.features == {**whole.data.features, LOCATION: datasets.Value("string")}


def test_order_is_by_seed_and_epoch(folder: Path) -> None:
    settings = settings_of(folder)
    stream = stream_rows(settings, "CAUSAL_LM", 0)
    first = texts_of(stream)
    assert texts_of(stream) == texts_of(stream_rows(settings, "CAUSAL_LM", 0)) == first
    assert texts_of(stream_rows(settings, "CAUSAL_LM", 1)) != first
    stream.set_epoch(1)
    second = texts_of(stream)
    assert second != first and sorted(second) == sorted(first)
    stream.set_epoch(0)
    assert texts_of(stream) == first


def test_one_file_is_shuffled_within_the_buffer(put: Put) -> None:
    path = put("a.txt", "\n".join(map(str, range(1000))))
    numbers = list(map(int, texts_of(stream_rows(settings_of(path, shuffle_buffer=100), "CAUSAL_LM", 0))))
    assert sorted(numbers) == list(range(1000)) != numbers
    assert all(number <= at + 100 for at, number in enumerate(numbers))  # no row comes before it was read


@pytest.mark.parametrize("epoch", [0, 1, 3])
@pytest.mark.parametrize("skipped", [0, 1, 777, 1200])
def test_a_pass_goes_on_where_it_was_left(folder: Path, epoch: int, skipped: int) -> None:
    stream = stream_rows(settings_of(folder), "CAUSAL_LM", 0)
    stream.set_epoch(epoch)
    rest = rest_of(stream, skipped)
    assert texts_of(rest) == texts_of(stream)[skipped:]
    assert rest.features == stream.features


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_the_rows(folder: Path, count: int) -> None:
    stream = stream_rows(settings_of(folder), "CAUSAL_LM", 0)
    stream.set_epoch(1)
    places = [row[LOCATION] for rank in range(count) for row in split_dataset_by_node(stream, rank, count)]
    assert len(places) == len(set(places)) == 1200


def test_workers_share_the_rows(folder: Path) -> None:
    stream = stream_rows(settings_of(folder, eval_fraction=0.05), "CAUSAL_LM", 0)
    places = [row[LOCATION] for row in DataLoader(stream, batch_size=None, num_workers=2)]  # type: ignore[arg-type]
    assert len(places) == len(set(places)) and sorted(places) == sorted(row[LOCATION] for row in stream)


def test_what_is_held_out_is_never_learned(folder: Path) -> None:
    settings = settings_of(folder, eval_fraction=0.1, shuffle_buffer=100_000)
    held_out, stream = held_out_rows(settings, "CAUSAL_LM", 0), stream_rows(settings, "CAUSAL_LM", 0)
    measured = {normalized(text) for text in held_out.data["text"][:]}
    learned = texts_of(stream)
    assert len(measured) == len(held_out.data) and measured.isdisjoint(map(normalized, learned))
    assert 50 < len(measured) < 110  # a tenth of 800 different texts
    everything = Counter(map(normalized, read_rows(settings).data["text"][:]))
    assert Counter(map(normalized, learned)) == Counter(
        {text: count for text, count in everything.items() if text not in measured}
    )
    assert held_out.layout.kind == "text" and {*held_out.data.features, LOCATION} == {*stream.features}
    again = places_of(held_out_rows(settings, "CAUSAL_LM", 0))
    assert again == places_of(held_out) != places_of(held_out_rows(settings, "CAUSAL_LM", 1))


def test_at_most_a_tenth_of_the_buffer_is_held_out_and_of_every_file_some(folder: Path) -> None:
    settings = settings_of(folder, eval_fraction=0.5, shuffle_buffer=300)
    held_out = held_out_rows(settings, "CAUSAL_LM", 0)
    files = Counter(Path(location.source).name[0] for location in held_out.locations)
    assert files == {"0": 10, "1": 10, "2": 10}
    learned = texts_of(stream_rows(settings, "CAUSAL_LM", 0))
    assert {normalized(text) for text in held_out.data["text"][:]}.isdisjoint(map(normalized, learned))
    assert len(learned) > 1200 - 2 * 30 - 1  # nothing more is lost than the texts that are measured, and their repeats


def test_something_is_held_out_however_few_there_are(put: Put) -> None:
    settings = settings_of(put("a.txt", "one\ntwo\nthree"), eval_fraction=1e-9)
    assert len(held_out_rows(settings, "CAUSAL_LM", 0).data) == 1
    assert len(texts_of(stream_rows(settings, "CAUSAL_LM", 0))) == 2
    assert len(held_out_rows(settings_of(put("a.txt", "one"), eval_fraction=0), "CAUSAL_LM", 0).data) == 0


def test_a_limit_counts_rows_that_are_read(folder: Path) -> None:
    settings = settings_of(folder, limit=450, eval_fraction=0.1)
    first = set(places_of(read_rows(settings)))
    held_out = places_of(held_out_rows(settings, "CAUSAL_LM", 0))
    learned = [row[LOCATION] for row in stream_rows(settings, "CAUSAL_LM", 0)]
    assert len(held_out) + len(learned) == 450 and {*held_out, *learned} == first


def test_weights_are_probabilities(folder: Path) -> None:
    paths = [str(folder / "0.jsonl"), str(folder / "1.jsonl")]
    stream = stream_rows(settings_of(paths, weights=[3, 1], shuffle_buffer=10), "CAUSAL_LM", 0)
    first = texts_of(stream)
    share = sum(text.endswith("of 0") for text in first) / len(first)
    assert abs(share - 0.75) < 0.06 and len(set(first)) == len(first)
    assert texts_of(stream) == first
    stream.set_epoch(1)
    assert texts_of(stream) != first
    limited = stream_rows(settings_of(paths, weights=[3, 1], limit=40), "CAUSAL_LM", 0)
    assert len(texts_of(limited)) == 40
    with pytest.raises(DataError, match="one weight for each path"):
        stream_rows(settings_of(paths, weights=[1]), "CAUSAL_LM", 0)


def test_broken_rows_are_said_and_null(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    lines = ['{"text": "a"}', "broken", '{"text": 7}', '{"text": null}', *["x"] * 5]
    path = put("a.jsonl", "\n".join(lines))
    rows = {row[LOCATION]: row["text"] for row in stream_rows(settings_of(path, eval_fraction=0.5), "CAUSAL_LM", 0)}
    held_out = held_out_rows(settings_of(path, eval_fraction=0.5), "CAUSAL_LM", 0)
    rows |= dict(zip(places_of(held_out), held_out.data["text"][:], strict=True))
    assert rows == {f"{path}:{line}": "a" if line == 1 else None for line in range(1, 10)}
    assert "a.jsonl:2: not JSON" in caplog.text and "a.jsonl:3: column 'text' holds int" in caplog.text
    assert "a.jsonl:5" in caplog.text and "a.jsonl:6" not in caplog.text  # the first three


def test_the_labels_of_all_files_are_of_one_type(put: Put) -> None:
    put("all/a.csv", "text,label\n" + "x,1\n" * 600 + "y,0.5\n")  # the fraction stands behind what is looked at
    folder = put("all/b.csv", "text,label\nz,2.5\n").parent
    labels = [row["label"] for row in stream_rows(settings_of(folder), "SEQ_CLS", 0)]
    assert Counter(labels) == {1.0: 600, 0.5: 1, 2.5: 1}


def test_sources_that_cannot_be_read_at_all_stop_the_stream(put: Put) -> None:
    put("all/a.jsonl", '{"text": "a"}')
    folder = put("all/b.jsonl", "").parent
    for function in (stream_rows, held_out_rows):
        with pytest.raises(DataError, match=r"b\.jsonl: empty, no row in it"):
            function(settings_of(folder), "CAUSAL_LM", 0)
    with pytest.raises(DataError, match=r"b\.jsonl has no columns for CAUSAL_LM: .*; it has none"):
        put("all/b.jsonl", "{}")
        stream_rows(settings_of(folder), "CAUSAL_LM", 0)


def test_kinds_and_types_are_as_when_read_whole(put: Put, tmp_path: Path) -> None:
    records = [{"tokens": ["a", "b"], "tags": [number % 3, 1]} for number in range(50)]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    stream = stream_rows(settings_of(tmp_path / "saved"), "TOKEN_CLS", 0)
    whole = read_rows(settings_of(tmp_path / "saved"), "TOKEN_CLS")
    assert stream.features == {**whole.data.features, LOCATION: datasets.Value("string")}
    rows = [{**row, LOCATION: place} for row, place in zip(whole.data, places_of(whole), strict=True)]
    assert sorted(stream, key=lambda row: row[LOCATION]) == sorted(rows, key=lambda row: row[LOCATION])
    path = put("a.csv", "text,label\n" + "x,1\ny,2.5\n" * 9)
    assert {row["label"] for row in stream_rows(settings_of(path), "SEQ_CLS", 0)} == {1.0, 2.5}


PEAK = """
import sys
from lorakeet.config import DataSettings
from lorakeet.data.read.source import iter_rows
from lorakeet.data.rows.stream import held_out_rows, stream_rows

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))  # KiB

def passed(path):
    settings = DataSettings(path=path, stream=True, shuffle_buffer=1000)
    read = sum(1 for _ in iter_rows(settings))
    if sys.argv[3] == "read":
        return read, 0
    return read, len(held_out_rows(settings, "CAUSAL_LM", 0).data) + sum(1 for _ in stream_rows(settings, "CAUSAL_LM", 0))

passed(sys.argv[1])
before = peak()
print(*passed(sys.argv[2]), peak() - before)
"""
ROWS = 150_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read as Linux tells it")
@pytest.mark.parametrize(
    ("format", "how"),
    [("jsonl", "stream"), *((format, "read") for format in ("csv", "txt", "fortune", "parquet", "arrow"))],
)
def test_memory_stays_flat(tmp_path: Path, format: str, how: str) -> None:
    """A file of 60 MB in small rows takes no more memory than one of 3 MB."""
    few, many = tmp_path / f"few.{format}", tmp_path / f"many.{format}"
    write(few, format, ROWS // 20)
    write(many, format, ROWS)
    size = many.stat().st_size
    assert size > 60e6
    done = subprocess.run([sys.executable, "-c", PEAK, few, many, how], capture_output=True, text=True, check=True)
    read, streamed, grown = map(int, done.stdout.split())
    assert read == ROWS and streamed == (ROWS if how == "stream" else 0)
    assert grown < 8_000, f"{grown} KiB more for a file of {size >> 10} KiB"


def write(path: Path, format: str, count: int) -> None:
    texts = (
        f"{number:>9} and here is what this row has to say: {number * 7919 % 1_000_003:>360}" for number in range(count)
    )
    if format in ("parquet", "arrow"):
        write_table(path, format, list(texts))
        return
    head, line = {
        "jsonl": ("", '{{"text": "{}"}}\n'),
        "csv": ("text,n\n", "{},1\n"),
        "txt": ("", "{}\n"),
        "fortune": ("", "{}\n%\n"),
    }[format]
    with path.open("w") as file:
        file.write(head)
        file.writelines(line.format(text) for text in texts)


def write_table(path: Path, format: str, texts: list[str]) -> None:
    table = pyarrow.table({"text": texts})
    if format == "parquet":  # all in one group of rows
        pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, row_group_size=len(texts))
        return
    with pyarrow.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=5000)

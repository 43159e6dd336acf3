"""Data: from a file, a folder or a hub data set to checked, tokenized, collated batches.

Five steps, each with the modules of its room in reading order:

1. ``read``, bytes to records with a location: ``locate``, ``formats``, ``text_formats``, ``fortune``, ``csv_rows``,
   ``yaml_rows``, ``table_formats``, ``hub``, ``source``; ``record`` and ``column_types`` are what they return.
2. ``rows``, records to canonical rows of one kind: ``kinds``, ``column_mapping``, ``normalize``, ``values``,
   ``conversations``, ``load``, ``stream``, ``mixing``, ``split``, ``label_set``.
3. ``encode``, rows to token ids and labels: ``encoder``, ``kinds``, ``text``, ``chat``, ``classification``,
   ``tagging``, ``seq2seq``, ``pairs``, ``masked``, ``question``, ``cache``, ``render``.
4. ``doctor``, the issues of rows: ``issues``, ``checks``, ``text_damage``, ``duplicates``, ``leakage``, ``label_stats``,
   ``token_stats``, ``length_histogram``, ``examiner``, ``examine``, ``diagnosis``; ``record_fixes`` and ``fix`` correct them.
5. Samples for a run: ``prepare``, ``prepare_stream``, ``prepared``, ``prepare_report``, and ``collate`` for batches.
"""

from __future__ import annotations

from lorakeet.data.collate import PaddingCollator
from lorakeet.data.encode.kinds import register_kinds
from lorakeet.data.encode.render import show_sample
from lorakeet.data.prepare import prepare
from lorakeet.data.prepare_report import PrepareReport
from lorakeet.data.prepared import Prepared
from lorakeet.data.rows.load import read_rows

register_kinds()

__all__ = ["PaddingCollator", "PrepareReport", "Prepared", "prepare", "read_rows", "show_sample"]

"""Data: from a file, a folder or a hub data set to checked, tokenised, collated batches.

Read it in this order:

- :mod:`~lorakeet.data.read.locate`: where the data is;
- :mod:`~lorakeet.data.read.formats` and :mod:`~lorakeet.data.read.fortune`: each file format to rows;
- :mod:`~lorakeet.data.rows.load`: rows with one column of text (:func:`read_rows`);
- :mod:`~lorakeet.data.rows.split`: the held-out part, by content;
- :mod:`~lorakeet.data.encode.cache`: token ids with an end token, kept for the next run;
- :mod:`~lorakeet.data.prepare`: all of it at once, with a report (:func:`prepare`);
- :mod:`~lorakeet.data.collate`: batches, padding masked by position (:class:`PaddingCollator`);
- :mod:`~lorakeet.data.encode.render`: what of a sample is learned (:func:`show_sample`).
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

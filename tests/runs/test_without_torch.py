"""A finished run is read without torch, transformers or datasets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

READ = """
import json, sys
from lorakeet.runs import metrics_log, run_folder
lines = metrics_log.read_metrics(sys.argv[1] + "/metrics.jsonl")
summary = run_folder.read_summary(sys.argv[1])
heavy = sorted({"torch", "transformers", "datasets", "numpy"} & sys.modules.keys())
print(json.dumps([lines, metrics_log.first_and_last(lines), summary, heavy]))
"""


def test_metrics_and_summary_are_read_without_torch(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    (tmp_path / "summary.json").write_text('{"steps": 2}\n')
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[{"step": 1, "loss": 2.5}], [2.5, 2.5], {"steps": 2}, []]

"""Optional packages stay hidden from transformers until they are needed."""

import subprocess
import sys

SEEN = """
import sys
from lorakeet._optional_imports import hide_optional_packages, allow_sklearn
hide_optional_packages()
import lorakeet
lorakeet.Trainer
assert not any(name.split(".")[0] in ("peft", "bitsandbytes", "sklearn", "scipy") for name, m in sys.modules.items() if m)
import numpy as np
from lorakeet.tasks import metrics
print(metrics._macro_f1(np.array([0, 1]), np.array([0, 1])))
"""


def test_the_program_leaves_out_what_it_does_not_need() -> None:

    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr


def test_the_entry_point_does_so_and_what_is_there_already_stays() -> None:
    code = (
        "import sys, json\nsys.modules['scipy'] = json\nfrom lorakeet.cli import script\nsys.argv[1:] = ['--version']\n"
    )
    code += "try:\n    script()\nexcept SystemExit:\n    print(sys.modules['peft'], sys.modules['scipy'] is json)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "None True", done.stderr

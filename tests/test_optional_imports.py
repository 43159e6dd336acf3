"""Optional packages stay hidden from transformers until they are needed."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lorakeet._optional_imports import import_late

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


COMPILER = """
import sys
sys.argv[1:] = ["{command}"]
from lorakeet import cli
def main():
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed.utils import is_dtensor
    from transformers.utils import is_torch_distributed_available
    assert not is_dtensor(torch.ones(1)) and torch.distributed.is_available()
    from accelerate.utils.other import is_compiled_module
    seen = [torch._disable_dynamo(lambda x: -x)(-2), is_torch_distributed_available()]
    seen += [is_compiled_module(torch.nn.Linear(1, 1))]
    seen += [name for name in ("torch._dynamo.convert_frame", "torch.distributed.tensor") if name in sys.modules]
    from lorakeet._optional_imports import has_compiler
    assert not has_compiler()
    from transformers.masking_utils import TransformGetItemToIndex
    with TransformGetItemToIndex():
        seen += [int(torch.vmap(lambda i: torch.arange(4)[i])(torch.tensor([3])))]
    from torch._dynamo import disable, OptimizedModule
    assert has_compiler()
    assert disable.__module__.startswith("torch._dynamo")
    compiled = torch.compile(torch.nn.Linear(1, 1))
    assert isinstance(compiled, OptimizedModule) and is_compiled_module(compiled)
    print(*seen)
cli.main = main
cli.script()
"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [("serve", "2 False False 3"), ("train", "2 True False torch.distributed.tensor 3")],
)
def test_the_compiler_of_torch_is_imported_when_something_is_compiled(command: str, expected: str) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILER.format(command=command)], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_a_late_package_is_imported_when_something_of_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rarely_needed"
    folder.mkdir()
    (folder / "__init__.py").write_text("import sys\nsys.rarely_needed = True\nfrom .inner import value\n")
    (folder / "inner.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delattr(sys, "rarely_needed", raising=False)
    import_late("rarely_needed")
    import_late("rarely_needed")
    import_late("there_is_no_such_package")
    package = importlib.import_module("rarely_needed")
    assert inspect.getmodule(import_late) is not None and not hasattr(sys, "rarely_needed")
    assert importlib.util.find_spec("rarely_needed") is package.__spec__ and package.__file__
    assert package.value == 7 and hasattr(sys, "rarely_needed") and type(package) is ModuleType
    assert sys.modules["rarely_needed"] is package and "there_is_no_such_package" not in sys.modules
    assert importlib.import_module("rarely_needed.inner").value == 7
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018
    for name in ("rarely_needed", "rarely_needed.inner"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys, "rarely_needed")

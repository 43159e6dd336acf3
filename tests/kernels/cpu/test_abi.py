"""Numbers and structs that C and Python share are compared when the library loads."""

from __future__ import annotations

import ctypes
import re

import pytest

from lorakeet.kernels.cpu import abi, build

pytestmark = pytest.mark.skipif(build.library() is None, reason="nothing is compiled on this machine")


def test_every_number_struct_and_field_of_the_header_is_compared() -> None:
    header = (build.SOURCE_FOLDER / "abi.h").read_text()
    code = re.sub(r"/\*.*?\*/|\[\w+\]", "", header, flags=re.S)  # without comments and sizes of arrays
    names = set(re.findall(r"\b(LK_\w+) =", code))
    for struct, body in re.findall(r"struct (lk_\w+) \{(.*?)\};", code, re.S):
        fields = [line.rpartition(" ")[2] if "," not in line else line for line in body.split(";") if line.strip()]
        names |= {
            struct,
            *(f"{struct}.{name}" for line in fields for name in re.findall(r"(\w+)(?=,|$)", line.strip())),
        }
    assert names == {name for name, _ in abi.expected()}
    assert all(build.library().lk_abi(name.encode()) >= 0 for name in names)
    assert build.library().lk_abi(b"lk_norm.nothing") == -1


def test_another_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abi.CONSTANTS, "LK_GROUP", 32)
    with pytest.raises(RuntimeError, match="disagree: LK_GROUP is 64 in C, 32 in Python"):
        abi.bind(build.library())


def test_another_struct_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Norm(ctypes.Structure):
        _fields_ = [("eps", ctypes.c_float), ("weight", ctypes.c_void_p)]

    monkeypatch.setitem(abi.STRUCTS, "lk_norm", Norm)
    with pytest.raises(RuntimeError, match="lk_norm.eps is 8 in C, 0 in Python; lk_norm.weight is 0 in C, 8 in Python"):
        abi.bind(build.library())


def test_every_exported_function_has_a_signature() -> None:
    defined = set()
    for path in build.sources():
        defined |= set(re.findall(r"^(?:void|ptrdiff_t|const char \*)\s*(lk_\w+)\(", path.read_text(), re.M))
    assert defined == {*abi.ARGUMENTS, *abi.SIZE_ARGUMENTS, "lk_cpu_features"}

"""The library of compiled loops: compiled once with the machine's own C compiler, and kept in the cache.

Without a compiler, or with ``LORAKEET_NATIVE=0``, :func:`library` is None and the callers compute the same in plain
torch. The library shares torch's threads: both use the one OpenMP runtime of the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lorakeet.files import cache_home
from lorakeet.kernels.cpu import self_check
from lorakeet.kernels.cpu.abi import bind
from lorakeet.log import warn
from lorakeet.security.paths import exists, paths_below

#: Folder of the C files. The library is all of them together.
SOURCE_FOLDER = Path(__file__).parent / "csrc"
#: Options of the compiler. Sums may be reordered, as vectors need it; NaN and infinity keep their meaning.
FLAGS = ["-O3", "-march=native", "-shared", "-fPIC", "-std=gnu11"]
FLAGS += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]


def sources() -> list[Path]:
    """Return the C files and headers, sorted by path."""
    return sorted(path for path in paths_below(SOURCE_FOLDER) if path.suffix in (".c", ".h"))


def flags() -> list[str]:
    """Return the options of the compiler; those of ``LORAKEET_CFLAGS`` come last, and so win."""
    return [*FLAGS, *shlex.split(os.environ.get("LORAKEET_CFLAGS", ""))]


#: Held while a thread compiles or loads the library.
_loading = threading.RLock()


@cache
def library() -> Any:
    """Load the compiled loops, or return None if they cannot be compiled, or compute something else than plain torch.

    Compiling takes a few seconds, the first time on a machine; later calls load the cached file.
    """
    with _loading:
        return _load()


def compile_meanwhile() -> threading.Thread:
    """Compile the library in a thread, unless it is there, while the caller works for seconds too.

    It says nothing. Where it fails, the first call of :func:`library` tries again and warns.
    """

    def run() -> None:
        with _loading, suppress(OSError, subprocess.SubprocessError):
            found = None if library.cache_info().currsize else _location()
            if found is not None and not exists(found[1]):
                compile_library(*found)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def _location() -> tuple[str, Path] | None:
    """Return the compiler, and the path of what it makes of these sources; None without one."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("LORAKEET_NATIVE") == "0" or compiler is None or os.name != "posix":
        return None
    contents = b"".join(path.read_bytes() for path in sources())
    key = hashlib.sha256(contents + repr((flags(), compiler, _processor())).encode()).hexdigest()[:16]
    return compiler, cache_home() / "native" / f"{key}.so"


def _load() -> Any:
    if (found := _location()) is None:
        return None
    try:
        return _checked(_cached_or_compiled(*found), found[1])
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warn(f"the C loops cannot be compiled ({lines[0] if lines else error}); plain torch computes instead")
        return None


def _cached_or_compiled(compiler: str, path: Path) -> Any:
    """Load the library from the cache; compile it first if it is not there, for this process alone if need be."""
    try:
        if not exists(path):
            compile_library(compiler, path)
        return bind(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError):  # a cache that is full, damaged or belongs to somebody else
        with tempfile.TemporaryDirectory() as folder:
            compile_library(compiler, Path(folder, path.name))
            return bind(ctypes.CDLL(str(Path(folder, path.name))))


def _checked(loaded: Any, path: Path) -> Any:
    """Return the library without the products that differ from fp64 on this machine; None if all may call one of them."""
    record = path.with_suffix(".json") if Path(loaded._name) == path else None
    loaded.differing = self_check.differing_products(loaded, record)
    if not loaded.differing:
        return loaded
    warn(f"compiled products differ from plain torch on this machine, and are not used: {', '.join(loaded.differing)}")
    return None if None in self_check.features_of(loaded.differing) else loaded


def switched_off() -> frozenset[str | None]:
    """Return the features of the processor whose compiled products differ from fp64 on this machine."""
    return frozenset() if library() is None else self_check.features_of(library().differing)


def library_version() -> str:
    """Return a hash of the compiled loops' sources, options and processor: others round differently. Without them: none."""
    return Path(library()._name).stem if library() is not None else "none"


def compile_library(compiler: str, path: Path) -> None:
    """Compile the library into ``path`` atomically; several processes may do so at a time.

    A compiler that does not know OpenMP makes a library with one thread.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [*compiler.split(), *flags()]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        try:
            _compile([*command, "-fopenmp"], made)
        except subprocess.CalledProcessError:
            _compile(command, made)
        made.replace(path)


def _compile(command: list[str], made: Path) -> None:
    """Compile the C files, as many at a time as there are processors, and link them into ``made``."""
    files = [file for file in sources() if file.suffix == ".c"]
    objects = {file: str(made.parent / f"{number}.o") for number, file in enumerate(files)}

    def run(*words: str) -> None:
        subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, check=True)

    def compile_one(file: Path) -> None:
        run("-c", f"-I{SOURCE_FOLDER}", str(file), "-o", objects[file])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the longest files first
        list(pool.map(compile_one, sorted(files, key=lambda file: -file.stat().st_size)))
    run(*objects.values(), "-o", str(made), "-lm")


def _processor() -> str:
    """Return a description of the instruction sets, as part of the key: machines that differ may share a cache."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if exists(cpuinfo) else []
    instruction_sets = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {instruction_sets}"

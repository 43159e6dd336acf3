"""The C sources under the address and undefined-behaviour sanitizers: kernels pass their own tests on that build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorakeet.kernels.cpu import build

ROOT = Path(__file__).parents[3]
#: Options of the sanitized build. The first report ends the process.
SANITIZE = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
#: Test files that together run every C function.
TESTS = (
    *("kernels/cpu/test_abi.py", "kernels/cpu/test_gemm.py", "kernels/cpu/test_elementwise.py"),
    *("kernels/int8/test_blocked.py", "kernels/int8/test_linear.py", "kernels/int8/test_tiled.py"),
    "kernels/int8/test_amx.py",
    *(
        "kernels/test_frozen_linear.py",
        "kernels/test_half_linear.py",
        "kernels/nf4/test_nf4_linear.py",
        "kernels/test_linear_cross_entropy.py",
        "kernels/attention/test_segment.py",
    ),
    *("kernels/test_decoder_step.py", "kernels/test_paged.py"),
)
#: Tests of the allocator, which the sanitizer replaces, and of an accuracy that only vectorized sums reach.
NOT_THESE = "not heap and not large_vocabulary"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose library is sanitized; ``LD_PRELOAD`` puts redzones around torch's tensors too."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None or os.name != "posix":
        pytest.skip("no C compiler on this machine")
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([*compiler.split(), f"-print-file-name={name}"], capture_output=True, text=True).stdout
        if not Path(found.strip()).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        runtimes.append(os.path.realpath(found.strip()))
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LORAKEET_")}
    env = {
        **plain,
        "LORAKEET_HOME": str(tmp_path_factory.mktemp("sanitized")),
        "LORAKEET_CFLAGS": SANITIZE,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    build_it = "from lorakeet.kernels.cpu import build; assert build.library() is not None"
    preloaded = {**env, "LD_PRELOAD": " ".join(runtimes)}
    # Compiled without LD_PRELOAD, as the compiler would be sanitized too. This process cannot load the library.
    subprocess.run([sys.executable, "-c", build_it], capture_output=True, env=env, cwd=ROOT)
    done = subprocess.run([sys.executable, "-c", build_it], capture_output=True, text=True, env=preloaded, cwd=ROOT)
    if done.returncode:
        pytest.skip(f"no sanitized library: {(done.stderr.splitlines() or ['no message'])[-1]}")
    return preloaded


@pytest.mark.slow
@pytest.mark.skipif(build.library() is None, reason="nothing is compiled on this machine")
def test_the_kernels_pass_their_tests_under_the_sanitizers(environment: dict[str, str]) -> None:
    files = [str(ROOT / "tests" / name) for name in TESTS]
    words = ["-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "--no-header", "-k", NOT_THESE, *files]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT)
    report = done.stdout[-6000:] + done.stderr[-6000:]
    assert done.returncode == 0 and "ERROR: AddressSanitizer" not in report and "runtime error" not in report, report


@pytest.mark.slow
@pytest.mark.skipif(build.library() is None, reason="nothing is compiled on this machine")
def test_the_sanitizer_sees_a_read_beyond_a_tensor(environment: dict[str, str]) -> None:
    """A bias that is too short, given without the checks."""
    script = (
        "import torch\nfrom lorakeet.kernels.cpu import gemm\n"
        "w, s = torch.ones(64, 40, dtype=torch.int8), torch.ones(64)\n"
        "gemm.gemv_w8(torch.ones(1, 40), w, s, None, torch.ones(8))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "gemv_w8.c" in done.stderr

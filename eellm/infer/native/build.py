"""From the kernels' source to a library for this processor, built once by the machine's C++ compiler and kept.

The file's name is a hash of the source, the options, and all that the compiler says of itself and of the processor:
another machine, another compiler or another release builds its own. Torch is loaded first, and its OpenMP with it;
the kernels' threads are therefore the same as torch's.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import threading
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (its OpenMP must be there before the kernels ask for one)

from eellm.errors import EellmError
from eellm.log import log

HERE = Path(__file__).parent
COMPILERS = ("g++", "clang++")
OPTIONS = (
    "-std=gnu++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
TIMEOUT_S = 300


class BuildError(EellmError):
    """The kernels can't be built here."""


@cache
def library(directory: Path) -> ctypes.CDLL:
    """The kernels; `directory` is where the library is kept. Raises BuildError."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler is installed (none of {', '.join(COMPILERS)} is found)")
    path = directory / f"kernels-{_key(compiler)}.so"
    if not path.exists():
        log.info("building the kernels for this processor; takes some seconds, once")
        _build(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} can't be loaded ({error}); delete it, and it is built anew") from error


def _key(compiler: str) -> str:
    digest = hashlib.sha256(" ".join(OPTIONS).encode())
    for source in [*sorted(HERE.glob("*.h")), HERE / "kernels.cpp"]:
        digest.update(source.read_bytes())
    # every macro that the compiler defines: its version, and the processor's instructions
    digest.update(_run([compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]))
    return digest.hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    temporary = path.with_suffix(f".tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _run([compiler, *OPTIONS, str(HERE / "kernels.cpp"), "-o", str(temporary)])
        temporary.replace(path)
    except OSError as error:
        raise BuildError(f"{path} can't be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} can't be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()[-2000:]}")
    return done.stdout

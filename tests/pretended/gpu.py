"""A GPU that is only a name, on a machine and with a PyTorch that need no CUDA.

    python -m tests.pretended.gpu SCRIPT.py ARGUMENTS

Runs a script in which, under FakeTensorMode, tensors of device "cuda" have shape and dtype and no memory, and autograd
goes through them. What the host would have to wait for cannot be computed and is an error, a mixture of devices too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path


def start(folder: Path) -> None:
    """Make the device known to PyTorch, which must not have been imported yet.

    Args:
        folder: For the library, which g++ makes.
    """
    assert "torch" not in sys.modules, "torch has been imported"
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    home, library = Path(found.origin).parent, folder / "pretended_gpu.so"
    subprocess.run(
        [
            "g++", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", str(Path(__file__).with_suffix(".cpp")),
            "-o", str(library), f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib",
        ],
        check=True,
    )  # fmt: skip
    ctypes.CDLL(str(home / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        start(Path(made))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

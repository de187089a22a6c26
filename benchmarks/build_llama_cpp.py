"""llama.cpp as llama-cpp-python ships it: its source package from PyPI, of which only a part is built.

    python benchmarks/build_llama_cpp.py build/llama-cpp

builds the library alone, for any CPU and soon rather than optimised, for `tests/test_gguf_llama_cpp.py`;
Python finds it with `PYTHONPATH=build/llama-cpp/source LLAMA_CPP_LIB_PATH=build/llama-cpp/build/bin`. The
benchmark of peers builds `llama-bench` for this CPU with all optimisations.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.3.36"
OFF = ("LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER")
OFF += ("LLAMA_BUILD_APP",)


def build(folder: Path, *targets: str) -> Path:
    """Download and build; what has been built stays.

    Args:
        folder: receives `source` (the Python bindings and llama.cpp) and `build`.
        targets: of llama.cpp's CMake; none: the library alone, with little optimisation.

    Returns:
        The folder of the programs and libraries.
    """
    source, out = folder / "source", folder / "build"
    built = [out / "bin" / name for name in targets or ("libllama.so",)]
    if all(file.exists() for file in built):
        return out / "bin"
    if not source.exists():
        _download(source)
    options = [f"-D{option}=OFF" for option in OFF]
    if targets:
        # GCC leaves out what _tile_loadconfig is to read: with AMX it would die of an illegal instruction.
        options += ["-DGGML_NATIVE=ON", "-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse"]
    else:
        targets = ("llama",)
        options += ["-DGGML_NATIVE=OFF", "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_BUILD_TOOLS=OFF"]
        options += [f"-DCMAKE_{language}_FLAGS_RELEASE=-O1" for language in ("C", "CXX")]
    vendored = source / "vendor" / "llama.cpp"
    configure = ["cmake", "-S", vendored, "-B", out, "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([*configure, *options], check=True)
    subprocess.run(["cmake", "--build", out, "-j", "2", "--target", *targets], check=True)
    return out / "bin"


def _download(source: Path) -> None:
    """The unpacked source package, complete or not at all."""
    source.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=source.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        package = f"llama-cpp-python=={VERSION}"
        subprocess.run([*pip, "--no-binary", ":all:", "-d", temporary, package], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        Path(temporary, archive.name.removesuffix(".tar.gz")).rename(source)


if __name__ == "__main__":
    build(Path(sys.argv[1]))

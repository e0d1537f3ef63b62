"""Package map, and a build step that runs CMake. Metadata stands in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(message: str) -> None:
    raise SystemExit(f"pyops build: {message}")


def torch_package() -> Path:
    """Directory of the torch this build compiles against, without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail("torch is not installed here: `pip install 'torch>=2.10'`, then build with --no-build-isolation")
    return Path(spec.origin).parent


def tool(name: str) -> str:
    """A program of this Python environment, else of PATH."""
    for directory in (Path(sys.executable).parent, None):
        found = shutil.which(name, path=str(directory) if directory else None)
        if found:
            return found
    fail(f"{name} is missing: `pip install {name}`")
    raise AssertionError


def build_cuda(torch: Path) -> bool:
    """PYOPS_BUILD_CUDA=0|1|auto; auto means: nvcc is there and torch was built for CUDA."""
    wish = os.environ.get("PYOPS_BUILD_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        fail(f"PYOPS_BUILD_CUDA must be 0, 1 or auto, got {wish!r}")
    nvcc = shutil.which("nvcc")
    if wish == "1" and nvcc is None:
        fail("PYOPS_BUILD_CUDA=1 but nvcc is not on PATH: install a CUDA toolkit")
    has_cuda_torch = bool(list((torch / "lib").glob("libtorch_cuda*")))
    return wish == "1" or (wish == "auto" and nvcc is not None and has_cuda_torch)


def cuda_architectures() -> str | None:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") in CMake's spelling."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not text:
        return None
    architectures = []
    for item in re.split(r"[;, ]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST: cannot read {item!r}; expected for example '8.0;9.0a+PTX'")
        assert match is not None
        number = match[1] + match[2] + match[3]
        architectures.append(f"{number}-real")
        if match[4]:
            architectures.append(f"{match[1]}{match[2]}-virtual")
    return ";".join(architectures)


def cuda_headers() -> str:
    """Include directories of the CUDA headers the emulator needs: the toolkit's, else those of PyPI's packages."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    candidates.append(Path("/usr/local/cuda/include"))
    for directory in candidates:
        if (directory / "cuda_fp16.h").exists():
            return ";".join(str(p) for p in (directory, directory / "cccl") if p.exists())
    site = Path(torch_package()).parent / "nvidia"
    found = sorted({str(p.parent) for p in site.glob("**/include/cuda_fp16.h")})
    if not found:
        fail("the emulator needs CUDA headers: `pip install -r requirements/emulator.txt`")
    found += sorted({str(p.parent.parent) for p in site.glob("**/include/**/nv/target")})
    return ";".join(found)


class CMakeBuild(build_ext):
    """Builds libpyops.so, the _host module and, on request, the emulator into the package directory."""

    def run(self) -> None:
        torch = torch_package()
        package = ROOT / "pyops" if self.inplace else Path(self.build_lib).resolve() / "pyops"
        package.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / ("cmake-inplace" if self.inplace else "cmake")
        emulator = os.environ.get("PYOPS_BUILD_EMULATOR", "0") == "1"
        cuda = build_cuda(torch)
        arguments = {
            "CMAKE_BUILD_TYPE": "Release",
            "PYOPS_TORCH_DIR": str(torch),
            "PYOPS_OUTPUT_DIR": str(package),
            "PYOPS_BUILD_CUDA": "ON" if cuda else "OFF",
            "PYOPS_BUILD_EMULATOR": "ON" if emulator else "OFF",
            "Python_EXECUTABLE": sys.executable,
        }
        if emulator:
            arguments["PYOPS_CUDA_INCLUDE_DIRS"] = cuda_headers()
        if cuda and (architectures := cuda_architectures()):
            arguments["PYOPS_CUDA_ARCHITECTURES"] = architectures
        try:
            import pybind11

            arguments["pybind11_DIR"] = pybind11.get_cmake_dir()
        except ImportError:
            fail("pybind11 is missing: `pip install pybind11`")
        if shutil.which("c++") is None and shutil.which("g++") is None and "CXX" not in os.environ:
            fail("no C++ compiler found: install g++ (>= 11) or clang++, or set CXX")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = [tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure.append(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
        configure += [f"-D{key}={value}" for key, value in arguments.items()]
        for command in (configure, [tool("cmake"), "--build", str(build), "--parallel", jobs]):
            if subprocess.call(command) != 0:
                fail(f"`{' '.join(command[:3])} ...` failed; the compiler's message stands above")


setup(
    packages=["pyops", "pyops.core", "pyops.ops", "pyops.kernels", "pyops.bench"],
    package_dir={"pyops": "pyops", "pyops.kernels": "kernels", "pyops.bench": "bench"},
    package_data={"pyops": ["py.typed", "*.so"], "pyops.bench": ["results/*.json"]},
    ext_modules=[Extension("pyops._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)

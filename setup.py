"""Package map, and a build step that runs CMake. Metadata stands in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TOOLKIT = Path("/usr/local/cuda")  # where a CUDA toolkit is if its nvcc is not on PATH


def fail(message: str) -> NoReturn:
    raise SystemExit(f"pyops build: {message}")


def torch_package() -> Path:
    """Directory of the torch this build compiles against, without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail("torch is not installed here: `pip install 'torch>=2.10'`, then build with --no-build-isolation")
    package = Path(spec.origin).parent
    if not (package / "include/torch/csrc/stable/library.h").exists():
        fail(f"the torch in {package} is too old: pyops needs torch >= 2.10 (its stable C++ interface)")
    return package


def tool(name: str) -> str:
    """A program of this Python environment, else of PATH."""
    for directory in (Path(sys.executable).parent, None):
        found = shutil.which(name, path=str(directory) if directory else None)
        if found:
            return found
    fail(f"{name} is missing: `pip install {name}`")


def check_compiler() -> None:
    """A C++ compiler that CMake will find."""
    given = os.environ.get("CXX")
    if given and shutil.which(given.split()[0]) is None:
        fail(f"no C++ compiler found: CXX={given!r} is not a program on PATH")
    if not given and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        fail("no C++ compiler found: install g++ (>= 11) or clang++, or set CXX")


def jobs() -> str:
    """Compilers to run at a time: MAX_JOBS, else the number of cores."""
    text = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) == 0:
        fail(f"MAX_JOBS must be a positive whole number, got {text!r}")
    return text


def pybind11_cmake_dir() -> str:
    try:
        import pybind11
    except ImportError:
        fail("pybind11 is missing: `pip install pybind11`")
    return pybind11.get_cmake_dir()


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


def cpu_capabilities(inplace: bool) -> str:
    """PYOPS_CPU_CAPABILITIES=all|native: for an editable install the widest of this machine, for a wheel all."""
    wish = os.environ.get("PYOPS_CPU_CAPABILITIES") or ("native" if inplace else "all")
    if wish not in ("all", "native"):
        fail(f"PYOPS_CPU_CAPABILITIES must be all or native, got {wish!r}")
    return wish


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
        if int(match[1]) < 8:
            fail(f"TORCH_CUDA_ARCH_LIST: got {item!r}; pyops needs compute capability 8.0 or newer")
        number = match[1] + match[2] + match[3]
        architectures.append(f"{number}-real")
        if match[4]:
            architectures.append(f"{match[1]}{match[2]}-virtual")
    return ";".join(architectures)


def cuda_headers() -> str:
    """Include directories of the CUDA headers the emulator needs: the toolkit's, else those of PyPI's packages."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    candidates.append(TOOLKIT / "include")
    for directory in candidates:
        if (directory / "cuda_fp16.h").exists():
            return ";".join(str(p) for p in (directory, directory / "cccl") if p.exists())
    for site in filter(None, sys.path):
        nvidia = Path(site) / "nvidia"
        found = sorted({str(p.parent) for p in nvidia.glob("**/include/cuda_fp16.h")})
        if found:
            return ";".join(found + sorted({str(p.parent.parent) for p in nvidia.glob("**/include/**/nv/target")}))
    fail("the emulator needs CUDA headers: `pip install -r requirements/emulator.txt`")


class CMakeBuild(build_ext):
    """Builds libpyops.so, the _host module and, on request, the emulator into the package directory."""

    def run(self) -> None:
        torch = torch_package()
        check_compiler()
        package = ROOT / "pyops" if self.inplace else Path(self.build_lib).resolve() / "pyops"
        package.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / ("cmake-inplace" if self.inplace else f"cmake-{sys.implementation.cache_tag}")
        emulator = os.environ.get("PYOPS_BUILD_EMULATOR", "0")
        if emulator not in ("0", "1", "asan"):
            fail(f"PYOPS_BUILD_EMULATOR must be 0, 1 or asan, got {emulator!r}")
        cuda = build_cuda(torch)
        arguments = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "PYOPS_TORCH_DIR": str(torch),
            "PYOPS_OUTPUT_DIR": str(package),
            "PYOPS_CPU_CAPABILITIES": cpu_capabilities(bool(self.inplace)),
            "PYOPS_BUILD_CUDA": "ON" if cuda else "OFF",
            "PYOPS_BUILD_EMULATOR": "OFF" if emulator == "0" else "ON",
            "PYOPS_BUILD_EMULATOR_ASAN": "ON" if emulator == "asan" else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_cmake_dir(),
        }
        if emulator != "0":
            arguments["PYOPS_CUDA_INCLUDE_DIRS"] = cuda_headers()
        elif not self.inplace:
            # of an earlier build in this tree; a wheel packs whatever stands here
            for library in (*package.glob("libpyops_emulator*.so"), *package.glob("libpyops_asan.so")):
                library.unlink()
        if cuda and (architectures := cuda_architectures()):
            arguments["PYOPS_CUDA_ARCHITECTURES"] = architectures
        cmake = tool("cmake")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in arguments.items()]
        for command in (configure, [cmake, "--build", str(build), "--parallel", jobs()]):
            if subprocess.call(command) != 0:
                fail(f"`{' '.join(command[:3])} ...` failed; the compiler's message stands above")


setup(
    packages=["pyops", "pyops.compat", "pyops.core", "pyops.demo", "pyops.ops", "pyops.kernels", "pyops.bench"],
    package_dir={"pyops": "pyops", "pyops.kernels": "kernels", "pyops.bench": "bench"},
    package_data={"pyops": ["py.typed"], "pyops.bench": ["results/*.json"]},
    ext_modules=[Extension("pyops._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)

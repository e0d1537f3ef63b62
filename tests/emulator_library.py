"""Builds and loads the emulator's tests, tests/emulator/*.cu: for the CPU, with AddressSanitizer, or for a GPU."""

import contextlib
import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "emulator"
GOLDEN = SOURCES / "golden"
HOPPER_ONLY = ("hopper.cu", "wgmma.cu", "bugs_hopper.cu", "conformance_hopper.cu")


def cuda_include_dirs() -> list[Path]:
    """CUDA headers: of the toolkit, else of the PyPI packages nvidia-cuda-runtime, -crt and -cccl."""
    given = os.environ.get("PYOPS_CUDA_INCLUDE_DIRS")
    if given:
        return [Path(p) for p in given.split(";")]
    candidates = [Path("/usr/local/cuda/include")]
    candidates += [Path(p) / "nvidia" / "cu13" / "include" for p in sys.path]
    return [p for p in candidates if (p / "cuda_fp16.h").exists()][:1]


def program(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def build(asan: bool = False) -> Path:
    """Path of the up-to-date library."""
    target = "pyops_emulator_tests_asan" if asan else "pyops_emulator_tests"
    cmake, ninja = program("cmake"), program("ninja")
    if cmake is None or ninja is None:
        raise FileNotFoundError("cmake and ninja are needed to build the emulator's tests")
    directory, library = ROOT / "build" / "emulator-tests", f"{target}.so"
    commands = [[cmake, "-S", str(ROOT / "csrc" / "emulator"), "-B", str(directory), "-G", "Ninja"]]
    commands[0] += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    commands[0] += [f"-DPYOPS_CUDA_INCLUDE_DIRS={';'.join(str(p) for p in cuda_include_dirs())}"]
    whole = ROOT / "build" / "cmake-inplace"
    if (whole / "CMakeCache.txt").exists() and "EMULATOR:BOOL=ON" in (whole / "CMakeCache.txt").read_text():
        # `make emulator` has built the engine there
        directory, library, commands = whole, f"csrc/emulator/{library}", []
    commands.append([cmake, "--build", str(directory), "--target", target])
    with one_at_a_time(directory):
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return directory / library


@contextlib.contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Workers of `pytest -n` wait here for the one that builds."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_gpu(architecture: str = "sm_90a") -> Path:
    """The same tests for the GPU of this machine; only the files its architecture can compile."""
    library = ROOT / "build" / f"gpu_tests_{architecture}.so"
    hopper = architecture == "sm_90a"
    sources = [p for p in sorted(SOURCES.glob("*.cu")) if "bugs" not in p.name]
    sources = [p for p in sources if hopper or p.name not in HOPPER_ONLY]
    # Spelled out: the short -arch may add the PTX of the plain architecture, which has no wgmma.
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = ["nvcc", "-std=c++20", target, "-shared", "-Xcompiler=-fPIC", "-I", str(ROOT / "csrc")]
    library.parent.mkdir(exist_ok=True)
    subprocess.run([*command, *map(str, sources), "-o", str(library)], check=True)
    return library


class Library:
    """The C interface of tests/emulator/runner.cu, and the emulator's own where the library has it."""

    def __init__(self, path: Path):
        self._lib = ctypes.CDLL(str(path))
        self._lib.pyops_test_name.restype = ctypes.c_char_p
        self._lib.pyops_test_run.restype = ctypes.c_char_p
        self._lib.pyops_test_recorded.restype = ctypes.POINTER(ctypes.c_ubyte)
        if hasattr(self._lib, "pyops_emulator_statistics"):
            self._lib.pyops_emulator_statistics.restype = ctypes.c_uint64

    def names(self) -> list[str]:
        return [self._lib.pyops_test_name(i).decode() for i in range(self._lib.pyops_test_count())]

    def run(self, name: str, variant: int = 0) -> str:
        """Empty if the test passed, else what went wrong."""
        return self._lib.pyops_test_run(name.encode(), variant).decode()

    def recorded(self) -> bytes:
        size = ctypes.c_size_t()
        pointer = self._lib.pyops_test_recorded(ctypes.byref(size))
        return bytes(pointer[: size.value])

    def configure(self, **settings: object) -> None:
        for key, value in settings.items():
            if self._lib.pyops_emulator_configure(key.encode(), str(value).encode()) != 0:
                raise ValueError(f"the emulator does not know {key}={value}")

    def statistic(self, key: str) -> int:
        return int(self._lib.pyops_emulator_statistics(key.encode()))


def write_golden(library: Library, folder: Path = GOLDEN) -> int:
    """Runs every test of the library on this machine's GPU, keeps the conformance outputs; number of failures."""
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    for name in library.names():
        # each in a process of its own: after an illegal access the GPU is lost to the one that made it
        if (child := os.fork()) == 0:
            result = library.run(name)
            print(f"{name}: {result or 'ok'}", flush=True)
            if name.startswith("conformance_") and not result:
                (folder / f"{name}.bin").write_bytes(library.recorded())
            os._exit(bool(result))
        failures += os.waitpid(child, 0)[1] != 0
    return failures


if __name__ == "__main__":
    sys.exit(write_golden(Library(build_gpu(*sys.argv[1:]))))

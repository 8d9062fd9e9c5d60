"""CUDA kernels compiled for the CPU, in the place of `cupy.RawKernel`, with NumPy's arrays."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent


def compiler() -> str | None:
    """A C++ compiler that takes what the headers here are made of; None where there is none."""
    found = shutil.which("g++") or shutil.which("c++")
    probe = '#include "cuda_on_cpu.h"\n#include "cuda_fp16.h"\n'
    command = [found, "-std=c++17", "-fsyntax-only", f"-I{HERE}", "-x", "c++", "-"]
    works = found and subprocess.run(command, input=probe, text=True, capture_output=True, check=False).returncode == 0
    return found if works else None


class Library:
    """Compiled kernels: each of the (source, kernel name, options like -DROWS=3) that it was made of."""

    def __init__(self, cxx: str, folder: Path, kernels: Sequence[tuple[str, str, tuple[str, ...]]]) -> None:
        self._kernels = list(dict.fromkeys(kernels))
        parts = ['#include "cuda_on_cpu.h"', '#include "cuda_fp16.h"']
        for place, (source, name, options) in enumerate(self._kernels):
            defined = dict(option.removeprefix("-D").split("=") for option in options)
            parts += [f"#define {key} {value}" for key, value in defined.items()]
            parts.append(f"namespace kernel_{place} {{\n" + source.replace('extern "C"', "static") + "\n}")
            parts += [f"#undef {key}" for key in defined]
            parts.append(
                f'extern "C" int launch_{place}(const int* grid, const int* block, bool backwards, void** arguments)'
                f" {{ return cuda_on_cpu::launch(kernel_{place}::{name}, grid, block, backwards, arguments); }}"
            )
        (folder / "kernels.cpp").write_text("\n".join(parts))
        built = folder / "kernels.so"
        command = [
            cxx,
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            f"-I{HERE}",
            "-Werror=double-promotion",
            folder / "kernels.cpp",
            "-o",
            built,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self._functions = ctypes.CDLL(str(built))

    def raw_kernel(self, backwards: bool = False, changed: Callable[[str], str] = str) -> Any:
        """A stand-in for `cupy.RawKernel`; `changed` maps the source to that of a kernel in the library."""

        def make(source: str, name: str, options: tuple[str, ...]) -> Any:
            place = self._kernels.index((changed(source), name, options))
            function = getattr(self._functions, f"launch_{place}")
            kinds = re.search(rf"{name}\((.*?)\)", source, re.DOTALL)
            assert kinds
            pointers = ["*" in kind for kind in kinds[1].split(",")]

            def launch(grid: tuple[int, int], block: tuple[int, int], arguments: tuple[Any, ...]) -> None:
                assert [isinstance(each, np.ndarray) for each in arguments] == pointers
                # An array is passed as where it begins, whatever its strides, and a number as its bytes.
                values = [np.uint64(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments]
                boxes = [np.asarray(value) for value in values]
                addresses = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
                sizes = [(ctypes.c_int * 2)(*each) for each in (grid, block)]
                assert function(*sizes, ctypes.c_bool(backwards), addresses) == 0, "threads wait for ever at a barrier"

            return launch

        return make


def library_of(folder: Path, kernels: Sequence[tuple[str, str, tuple[str, ...]]]) -> Library:
    """The kernels, compiled; skip the test where there is no compiler."""
    cxx = compiler()
    if cxx is None:
        pytest.skip("there is no C++ compiler here that has <ucontext.h> and _Float16")
    return Library(cxx, folder, kernels)


def amid_nan(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array amid numbers that are none: what is read or written beside it shows. Its `base` is the whole."""
    return np.full(int(np.prod(shape)) + 2 * 4096, np.nan, dtype=dtype)[4096:-4096].reshape(shape)


class OnCPU:
    """What kernels need of CuPy."""

    def __init__(self, library: Library, backwards: bool, changed: Callable[[str], str] = str) -> None:
        self.RawKernel = library.raw_kernel(backwards, changed)
        self.empty = amid_nan

    def matmul(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        raise NotImplementedError("cuBLAS")


def to_gpu(cupy: Any, view: np.ndarray) -> Any:
    """The view on a GPU, with its strides, of a copy of all that is around it."""
    whole = cupy.asarray(view if view.base is None else view.base)
    offset = 0 if view.base is None else view.ctypes.data - view.base.ctypes.data
    return cupy.ndarray(view.shape, view.dtype, whole.data + offset, strides=view.strides)

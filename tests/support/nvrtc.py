"""CUDA's own compiler, which needs no GPU."""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from libraries import skipping_what_is_missing


def nvrtc() -> tuple[Any, Path]:
    """CUDA's compiler of the wheel nvidia-cuda-nvrtc, and its headers, of nvidia-cuda-runtime; neither needs a GPU."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    libraries = [each for root in roots for each in root.glob("**/libnvrtc.so.*")]
    headers = [each.parent for root in roots for each in root.glob("**/include/cuda_fp16.h")]
    if not (libraries and headers):
        with skipping_what_is_missing("nvrtc"):
            raise ModuleNotFoundError("NVRTC is not installed: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime")
    for second in libraries[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(second))  # NVRTC 13.0 finds it only where it is loaded already
    return ctypes.CDLL(str(libraries[0])), headers[0]


def compile_for(architecture: str, source: str, defines: tuple[str, ...]) -> str:
    """Compile, and return what the compiler had to say; empty where all is well."""
    return _compile(architecture, source, defines)[0]


def assembly(source: str, defines: tuple[str, ...]) -> str:
    """Compile, and return the instructions (PTX)."""
    log, instructions = _compile("compute_80", source, defines)
    assert not log
    return instructions


def _compile(architecture: str, source: str, defines: tuple[str, ...]) -> tuple[str, str]:
    library, headers = nvrtc()
    arguments = [f"-arch={architecture}", "-std=c++17", "-ftz=true", f"-I{headers}", f"-I{headers / 'cccl'}", *defines]
    encoded = [argument.encode() for argument in arguments]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"k.cu", 0, None, None) == 0
    failed = library.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert bool(failed) == ("error" in log.value.decode())
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    instructions = ctypes.create_string_buffer(size.value)
    if not failed:
        library.nvrtcGetPTX(program, instructions)
    return log.value.decode(), instructions.value.decode()

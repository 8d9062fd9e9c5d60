"""Compiles LLVM IR for this processor with llvmlite, and keeps the object code on disk.

A kernel is `name(arguments, thread, begin, end)`: the address of int64 numbers, the number of the thread, and which
parts of the work to do. It is called through ctypes, which lets other Python threads run meanwhile.
"""

import ctypes
import functools
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numpy as np
from platformdirs import user_cache_dir

from gpt_xp.quantization import GROUP

SIGNATURE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


class _Shared:
    """The lock of all `Kernels`: one thread at a time uses LLVM, and a process does not fork meanwhile."""

    lock = threading.RLock()


_KERNELS: list["Kernels"] = []  # It has those of this processor once they are asked for.
_VERSION = f"{llvmlite.__version__} {llvm.llvm_version_info}"


@dataclass(frozen=True)
class Target:
    """A processor: LLVM's names for it and for what it can do."""

    triple: str
    cpu: str
    features: str  # "+avx2,-avx512f,..."

    def has(self, feature: str) -> bool:
        """Return whether the processor has this feature of LLVM's list."""
        return f"+{feature}" in self.features.split(",")

    @property
    def is_x86(self) -> bool:
        """Whether it is one of Intel's or AMD's."""
        return self.triple.startswith(("x86_64", "i686", "amd64"))

    @property
    def width(self) -> int:
        """The float32 numbers in a vector register."""
        return 16 if self.has("avx512f") else 8 if self.has("avx2") and self.has("fma") else 4

    @property
    def n_registers(self) -> int:
        """The number of vector registers."""
        return 32 if self.has("avx512f") or self.triple.startswith(("aarch64", "arm64")) else 16

    @property
    def has_fma(self) -> bool:
        """Whether it multiplies and adds in one instruction. Otherwise LLVM would call a slow function."""
        return self.triple.startswith(("aarch64", "arm64")) or self.has("fma")

    @property
    def has_float16(self) -> bool:
        """Whether it converts float16 to float32 by an instruction."""
        return self.triple.startswith(("aarch64", "arm64")) or self.has("f16c")

    @property
    def has_dots(self) -> bool:
        """Whether it multiplies and adds four bytes for each float32 of a vector in one instruction (VNNI)."""
        return self.has("avx512vnni" if self.width == 16 else "avxvnni")


@functools.cache
def this_processor() -> Target:
    """Return the processor of this machine. Its 512-bit registers are used, if it has them."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, features = llvm.get_process_triple(), llvm.get_host_cpu_features().flatten()
    target = Target(triple, llvm.get_host_cpu_name(), features)
    return replace(target, features=f"{features},-prefer-256-bit") if target.is_x86 else target


def _target_machine(target: Target) -> Any:
    """Return a new machine of LLVM: an engine frees the one that it is given."""
    found = llvm.Target.from_triple(target.triple)
    return found.create_target_machine(cpu=target.cpu, features=target.features, opt=3, jit=True)


def object_code(text: str, target: Target) -> bytes:
    """Return the machine code of a module of LLVM IR, optimized for the target."""
    machine = _target_machine(target)
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = target.triple, str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code


class Kernels:
    """The compiled kernels of one processor. `make(name, text)` compiles each once, or finds it on disk."""

    def __init__(self, target: Target, folder: Path | None) -> None:
        self.target, self._folder = target, folder
        self._loaded: dict[str, int] = {}
        self._engine: Any = None  # It owns the code, so it lives as long as this.
        self._code: list[bytes] = []
        self.compile_seconds = 0.0

    def address(self, name: str, text: Callable[[], str]) -> int:
        """Return the address of the kernel `name`, which `text()` describes in LLVM IR."""
        if name not in self._loaded:
            with _Shared.lock:
                if name not in self._loaded:
                    self._loaded[name] = self._load(name, self._found(name) or self._compiled(name, text()))
        return self._loaded[name]

    def has(self, name: str) -> bool:
        """Return whether a kernel is loaded, or on disk."""
        return name in self._loaded or self._found(name) is not None

    def _path(self, name: str) -> Path | None:
        if self._folder is None:
            return None
        key = "\n".join((name, _sources(), str(GROUP), _VERSION, *vars(self.target).values()))
        return self._folder / f"{name[:40]}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.o"

    def _found(self, name: str) -> bytes | None:
        """Return the code on disk, if it is whole: a digest stands before it."""
        path = self._path(name)
        if path is None or not _is_ours(path.parent):
            return None
        try:
            content = path.read_bytes()
        except OSError:
            return None
        return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None

    def _compiled(self, name: str, text: str) -> bytes:
        begin = time.perf_counter()
        code = object_code(text, self.target)
        self.compile_seconds += time.perf_counter() - begin
        if path := self._path(name):
            _write(path, hashlib.sha256(code).digest() + code)
        return code

    def _load(self, name: str, code: bytes) -> int:
        if self._engine is None:
            self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine(self.target))
        self._code.append(code)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return int(self._engine.get_function_address(name))


def _write(path: Path, content: bytes) -> None:
    """Write a file of the cache at once, or not at all: a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
    except OSError:
        return


def _is_ours(folder: Path) -> bool:
    """Return whether only this user can write to a folder. Code that others could have put there is not run."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return os.name != "posix" or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)


@functools.cache
def _sources() -> str:
    """Return a digest of the code that makes kernels. Other code makes other kernels."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def kernels() -> Kernels:
    """Return the kernels of this processor, kept in the user's cache."""
    if not _KERNELS:
        with _Shared.lock:  # Two of them would each free their own code.
            if not _KERNELS:
                folder = Path(user_cache_dir("gpt-xp", appauthor=False)) / "kernels"
                _KERNELS.append(Kernels(this_processor(), folder if folder.is_absolute() else None))
    return _KERNELS[0]


def alone() -> Any:
    """Return a context in which no other thread compiles."""
    return _Shared.lock


def _begin_fork() -> None:
    _Shared.lock.acquire()


def _end_fork() -> None:
    _Shared.lock.release()


if hasattr(os, "register_at_fork"):  # A fork while a thread uses LLVM would leave LLVM locked.
    os.register_at_fork(
        before=_begin_fork,
        after_in_parent=_end_fork,
        after_in_child=lambda: setattr(_Shared, "lock", threading.RLock()),
    )


def numbers(*values: int) -> "np.ndarray[Any, Any]":
    """Return the arguments of a kernel as an array of int64."""
    return np.asarray(values, np.int64)

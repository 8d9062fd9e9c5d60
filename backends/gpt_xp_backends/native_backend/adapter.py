"""NumPy's arrays, with kernels that llvmlite compiles for this processor, on weights that are packed for them."""

import functools
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gpt_xp.backend import Backend, BackendInfo, DeviceInfo, check_dtype, few_sizes, import_library
from gpt_xp.config import GPT2Config
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.memory import physical_memory
from gpt_xp.quantization import QuantizedTable, QuantizedWeight
from gpt_xp.tree import tree_map
from gpt_xp.types import Array, Namespace, Params
from gpt_xp_backends import numpy_backend
from gpt_xp_backends.numpy_backend import NumPyBackend

if TYPE_CHECKING:
    from gpt_xp_backends.native_backend.step import Tracing

FIX = install_command("native")


class NativeBackend(NumPyBackend):
    """Compiled kernels on the CPU. With float16, weights are stored as float16, and all sums are float32."""

    name = "native"
    needs: ClassVar = {"llvmlite": FIX}
    needs_quantized: ClassVar[dict[str, str]] = {}
    takes_quantized = True
    copies_params = True
    _rounds_activations = False
    _packing = ""  # It says how long the weights were packed.
    _packed: ClassVar[dict[int, tuple[Any, Any]]] = {}  # Weights whose packed form is mapped, by id.

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        if device not in (None, "cpu"):
            raise BackendError(f"native has no device {device!r}, only cpu: take the backend cupy or jax for a GPU")
        super().__init__(None, "float32", threads)
        check_dtype("native", "cpu", dtype, ("float32", "float16"))
        llvmlite = import_library("llvmlite", FIX)
        from gpt_xp_backends.native_backend import threads as native_threads
        from gpt_xp_backends.native_backend.step import Runner, Tracing

        self.version, self.dtype = llvmlite.__version__, dtype
        self._n_threads = threads or native_threads.n_cores()
        tracing = Tracing()
        self.xp = _namespace(self._n_threads, tracing)
        self._runner = Runner(self.xp, self._n_threads, tracing)

    @classmethod
    def info(cls) -> BackendInfo:
        """Return llvmlite's version and the CPU."""
        llvmlite = import_library("llvmlite", FIX)
        return BackendInfo(
            cls.name, llvmlite.__version__, (DeviceInfo("cpu", f"{os.cpu_count()} cores", physical_memory()),)
        )

    def place(self, params: Params, config: GPT2Config) -> Params:
        """Return params whose token table and linear weights are packed."""
        from gpt_xp_backends.native_backend.machine import kernels
        from gpt_xp_backends.native_backend.packed import PackedTable, pack
        from gpt_xp_backends.native_backend.products import panel_columns

        columns = panel_columns(kernels().target)

        begin, n_packed = time.perf_counter(), 0

        def packed(weight: Any) -> Any:
            nonlocal n_packed
            if id(weight) in self._packed:
                return self._packed[id(weight)][1]
            n_packed += 1
            return pack(weight, self.dtype, columns, self._n_threads, rounds=self._rounds_activations)

        def table(wte: Any) -> Any:
            if id(wte) in self._packed:
                return packed(wte)
            return packed(QuantizedWeight(*wte) if isinstance(wte, QuantizedTable) else np.asarray(wte).T)

        def linear(w: Any, b: Any) -> Params:
            return {"w": packed(w), "b": wide(b)}

        def block(ln_1: Params, attn: Params, ln_2: Params, mlp: Params) -> Params:
            layers = [{name: linear(**layer) for name, layer in part.items()} for part in (attn, mlp)]
            return {"ln_1": wide(ln_1), "attn": layers[0], "ln_2": wide(ln_2), "mlp": layers[1]}

        def wide(tree: Any) -> Any:
            # Copies, because a view keeps the pages of the file around it in memory.
            return tree_map(lambda leaf: np.array(leaf, np.float32, order="C"), tree)

        params = self.unplaced(params, config)
        wte = PackedTable(table(params["wte"]), self.xp)
        blocks = [block(**each) for each in params["blocks"]]
        self._packing = f"{time.perf_counter() - begin:.2f} s" if n_packed else "none, the weights are mapped"
        return {"wte": wte, "wpe": wide(params["wpe"]), "blocks": blocks, "ln_f": wide(params["ln_f"])}

    def with_copies(self, params: Params, folder: Path) -> Backend:
        """Return the backend, which takes the packed copy of these params in their folder where there is one."""
        from gpt_xp_backends.native_backend.packed_copy import read_copy

        path, columns = self._copy_path(params, folder)
        return self if self._rounds_activations else self.replace(_packed=read_copy(path, params, self.dtype, columns))

    def write_copy(self, folder: Path) -> Path:
        """Write a packed copy of the weights in `folder` into it, and return its path."""
        from gpt_xp.checkpoint import checkpoint
        from gpt_xp_backends.native_backend.packed_copy import stamp, write_copy

        before = stamp(folder)
        found = checkpoint.read(folder, aligned=False)
        path, _ = self._copy_path(found.params, folder)
        write_copy(path, self.place(found.params, found.config), before)
        return path

    def _copy_path(self, params: Params, folder: Path) -> tuple[Path, int]:
        from gpt_xp_backends.native_backend.machine import kernels
        from gpt_xp_backends.native_backend.packed_copy import copy_path
        from gpt_xp_backends.native_backend.products import panel_columns

        columns = panel_columns(kernels().target)
        return copy_path(folder, params, self.dtype, columns), columns

    def unplaced(self, params: Params, config: GPT2Config) -> Params:
        """Return params whose weights are not packed."""
        from gpt_xp_backends.native_backend.packed import PackedTable, PackedWeight, unpack

        def unpacked(leaf: Any) -> Any:
            if isinstance(leaf, PackedTable):
                weight = unpack(leaf.weight)
                return QuantizedTable(*weight) if isinstance(weight, QuantizedWeight) else weight.T
            return unpack(leaf) if isinstance(leaf, PackedWeight) else leaf

        return tree_map(unpacked, params)  # type: ignore[no-any-return]

    def fetch(self, params: Params, config: GPT2Config) -> Params:
        """Return params of `place` as NumPy arrays."""
        return self.unplaced(params, config)

    def quantized(self) -> Backend:
        """Return the backend itself."""
        return self

    def rounding_activations(self) -> Backend:
        """Return the backend that multiplies quantized weights by activations that are rounded to int8."""
        return self.replace(_rounds_activations=True)

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function, which is traced and run by kernels if it is given the backend's namespace."""
        plain = super().compile(function, static, donate)
        if not {"params", "tokens", "cache", "xp"} <= inspect.signature(function).parameters.keys():
            return plain
        from gpt_xp_backends.native_backend.step import NativeStep

        return functools.wraps(function)(NativeStep(function, plain, self._runner, self.waits_for_compiling))

    def cache_slots(self, n_tokens: int, n_ctx: int) -> int:
        """Return one of few sizes, because each is traced. Attention leaves out the slots that are hidden."""
        return min(few_sizes(n_tokens), n_ctx)

    def compile_seconds(self) -> float:
        """Return the seconds spent on compiling kernels that were not on disk."""
        from gpt_xp_backends.native_backend.machine import kernels

        return kernels().compile_seconds

    def settings(self) -> dict[str, str]:
        """Return the processor as LLVM names it, the threads, and how long the weights were packed.

        `not_traced` is there if a step was computed without kernels, and says why.
        """
        from gpt_xp_backends.native_backend.machine import this_processor

        target = this_processor()
        found = {"cpu": target.cpu, "vector": f"{32 * target.width} bits", "threads": str(self._n_threads)}
        if self._packing:
            found["packing"] = self._packing
        return found | ({"not_traced": self._runner.problem} if self._runner.problem else {})


def _namespace(n_threads: int, tracing: "Tracing") -> Namespace:
    """Return NumPy's namespace, in which three functions take packed weights."""
    from gpt_xp_backends.native_backend import tape, tracer
    from gpt_xp_backends.native_backend.packed import PackedTable, PackedWeight

    plain = numpy_backend.namespace()

    def matmul(x: Array, w: Any) -> Array:
        if not isinstance(w, PackedWeight):
            return plain.matmul(x, w)
        rows = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
        if tracing.is_compiling and w.scales is None:
            out = w.product(rows)
        else:
            calls = tape.Tape(tape.Arena(), n_threads)
            out = tracer.product(calls, rows, w)
            calls.run()
        return out.reshape(*x.shape[:-1], w.shape[1])

    def take(x: Any, indices: Array, axis: int) -> Array:
        return (
            x.weight.columns(np.asarray(indices)) if isinstance(x, PackedTable) else plain.take(x, indices, axis=axis)
        )

    def matrix_transpose(x: Any) -> Any:
        return x.weight if isinstance(x, PackedTable) else plain.matrix_transpose(x)

    return numpy_backend.NumPy(**vars(plain) | {"matmul": matmul, "take": take, "matrix_transpose": matrix_transpose})


__all__ = ["BackendError", "NativeBackend"]

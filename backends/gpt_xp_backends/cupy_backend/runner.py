"""Runs a decode step of CuPy as a CUDA graph: hundreds of launches from Python become one.

A graph is fixed to the addresses of all arrays. So the arrays that a step makes on the way come from a pool of memory
that belongs to the graph alone.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from gpt_xp.types import Array, Namespace
from gpt_xp_backends.cupy_backend import kernels
from gpt_xp_backends.cupy_backend.kernels.products import ROWS
from gpt_xp_backends.tracing import Calls, Tracer


class CudaGraph:
    """A captured step."""

    output: Array = None
    _graph: Any = None

    def __init__(self, cupy: Any) -> None:
        self._device, self.pool = cupy.cuda.Device(), cupy.cuda.MemoryPool()

    def __del__(self) -> None:
        # A pool of CuPy 14 and its free blocks hold each other, and Python's collector does not see it: memory that is
        # not given back here is lost until the process ends.
        self._graph = self.output = None
        with contextlib.suppress(Exception), self._device:  # At the end of the process CUDA may be gone.
            self.pool.free_all_blocks()  # It frees those of the current device.

    def capture(self, cupy: Any, step: Callable[[], Array]) -> Array:
        """Run a step and capture it; return the output of the run."""
        cupy.cuda.runtime.deviceSynchronize()  # The stream below does not wait for the one that made the arrays.
        stream = cupy.cuda.Stream(non_blocking=True)
        with cupy.cuda.using_allocator(self.pool.malloc), stream:
            made = step()  # It compiles and loads all kernels, and fills the pool.
            stream.synchronize()
        output = made.copy()  # The pool then has all memory that the capture takes.
        del made
        with cupy.cuda.using_allocator(self.pool.malloc), stream:
            try:
                stream.begin_capture()
                self.output = step()
            except BaseException:
                with contextlib.suppress(Exception):  # The first error is the one that says why.
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()
        return output

    def run(self) -> None:
        """Launch the graph."""
        self._graph.launch()


class CudaRunner:
    """Captures steps of the namespace `xp`, with `calls` as kernels. cuBLAS, as CuPy calls it, cannot be captured."""

    max_rows = ROWS

    def __init__(self, cupy: Any, xp: Namespace, calls: Calls) -> None:
        self._cupy, self.xp, self.tracer = cupy, xp, Tracer(xp, calls)
        self._graphs: weakref.WeakSet[CudaGraph] = weakref.WeakSet()
        self.peak_bytes = 0  # the most memory that all graphs held

    def record(self, step: Callable[[], Array]) -> tuple[Array, CudaGraph]:
        """Run a step and capture it; return the output of the run, and the graph."""
        graph = CudaGraph(self._cupy)
        output = graph.capture(self._cupy, step)
        self._graphs.add(graph)
        self.peak_bytes = max(self.peak_bytes, sum(each.pool.total_bytes() for each in self._graphs))
        return output, graph

    def address(self, x: Array) -> int:
        """Return where an array begins on the device."""
        return kernels.address(x)

    def wait(self) -> None:
        """Wait for the device."""
        self._cupy.cuda.runtime.deviceSynchronize()

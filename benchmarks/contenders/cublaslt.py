"""Products by cuBLASLt, through nvmath-python, which unlike CuPy's cuBLAS a CUDA graph can capture. Not run on a GPU.

cuBLAS thinks in columns: row-major [rows, n_in] @ [n_in, n_out] is asked for as out.T = w.T @ x.T, so `w` is its A,
`x` its B, and a matrix that lies row by row is "not transposed" there. What cannot be captured is done once for a
shape, outside of a capture: asking for an algorithm (CUDA 13.3's query failed inside one: mudler/vllm.cpp#1732).
"""

from typing import Any

import numpy as np
from nvmath import CudaDataType
from nvmath.bindings import cublas, cublasLt

WORKSPACE = 32 << 20  # bytes; what PyTorch, PyFR and NVIDIA's notes on Hopper give it

# dtype -> the type of the numbers, that of alpha and beta, and how sums are computed: 32F is never TF32
TYPES = {
    "float16": (CudaDataType.CUDA_R_16F, CudaDataType.CUDA_R_32F, cublas.ComputeType.COMPUTE_32F),
    "float32": (CudaDataType.CUDA_R_32F, CudaDataType.CUDA_R_32F, cublas.ComputeType.COMPUTE_32F),
    "float64": (CudaDataType.CUDA_R_64F, CudaDataType.CUDA_R_64F, cublas.ComputeType.COMPUTE_64F),
}


def lt_matmul(cupy: Any) -> Any:
    """Return `matmul(x, w)` for matrices of equal dtype on the current device; their strides are not copied away."""
    handle = cublasLt.create()  # It belongs to the current device.
    workspace = cupy.empty(WORKSPACE, dtype=cupy.uint8)  # one product after the other: of one stream, or of one graph
    scalars = {dtype: np.array([1, 0], "f8" if dtype == "float64" else "f4") for dtype in TYPES}  # alpha, beta: host
    plans: dict[Any, Any] = {}

    def plan(dtype: str, x: Any, w: Any) -> Any:
        if cupy.cuda.get_current_stream().is_capturing():
            raise RuntimeError(f"no cuBLASLt algorithm for {x.shape} @ {w.shape}: run the step once before its capture")
        numbers, scale, sums = TYPES[dtype]
        (rows, n_in), n_out = x.shape, w.shape[1]
        (w_op, w_ld), (x_op, x_ld) = _layout(w), _layout(x)
        desc = cublasLt.matmul_desc_create(sums, scale)
        for attribute, op in ((DESC.TRANSA, w_op), (DESC.TRANSB, x_op)):
            _set(cublasLt.matmul_desc_set_attribute, desc, attribute, op, np.int32)
        a = cublasLt.matrix_layout_create(numbers, *((n_in, n_out) if w_op else (n_out, n_in)), w_ld)
        b = cublasLt.matrix_layout_create(numbers, *((rows, n_in) if x_op else (n_in, rows)), x_ld)
        d = cublasLt.matrix_layout_create(numbers, n_out, rows, n_out)
        wish = cublasLt.matmul_preference_create()
        for attribute, value, kind in (
            (WISH.MAX_WORKSPACE_BYTES, WORKSPACE, np.uint64),
            # Where the sum is split, parts are added up in `sums`: not in float16, not by atomics in any order.
            (WISH.REDUCTION_SCHEME_MASK, cublasLt.ReductionScheme.COMPUTE_TYPE, np.uint32),
            (WISH.MIN_ALIGNMENT_A_BYTES, _alignment(w), np.uint32),  # 256 is assumed otherwise
            (WISH.MIN_ALIGNMENT_B_BYTES, _alignment(x), np.uint32),
        ):
            _set(cublasLt.matmul_preference_set_attribute, wish, attribute, value, kind)
        best, count = cublasLt.MatmulHeuristicResult(1), np.zeros(1, np.int32)
        cublasLt.matmul_algo_get_heuristic(handle, desc, a, b, d, d, wish, 1, best.ptr, count.ctypes.data)
        cublasLt.matmul_preference_destroy(wish)
        if not count[0]:
            raise RuntimeError(f"cuBLASLt has no algorithm for {dtype} {x.shape} @ {w.shape}")
        return desc, a, b, d, best  # never destroyed: as many as a model has shapes

    def matmul(x: Any, w: Any) -> Any:
        dtype = x.dtype.name
        key = dtype, x.shape, x.strides, _alignment(x), w.shape, w.strides, _alignment(w)
        if key not in plans:
            plans[key] = plan(dtype, x, w)
        desc, a, b, d, best = plans[key]
        out = cupy.empty((x.shape[0], w.shape[1]), dtype=x.dtype)  # CuPy's pool aligns it to 512 bytes.
        alpha, to = scalars[dtype].ctypes.data, out.data.ptr
        cublasLt.matmul(
            handle, desc, alpha, w.data.ptr, a, x.data.ptr, b, alpha + scalars[dtype].itemsize, to, d, to, d,
            best.ptr,  # the algorithm is the first field of the result
            workspace.data.ptr, WORKSPACE, cupy.cuda.get_current_stream().ptr,
        )  # fmt: skip
        return out

    return matmul


DESC, WISH = cublasLt.MatmulDescAttribute, cublasLt.MatmulPreferenceAttribute


def _layout(matrix: Any) -> tuple[int, int]:
    """Return cuBLAS's operation (transposed for column-major memory), and the distance of rows or columns."""
    (rows, columns), (row, column) = matrix.shape, (stride // matrix.itemsize for stride in matrix.strides)
    if (column == 1 or columns == 1) and (rows == 1 or row >= columns):
        return int(cublas.Operation.N), row if rows > 1 else columns
    if (row == 1 or rows == 1) and (columns == 1 or column >= rows):
        return int(cublas.Operation.T), column if columns > 1 else rows
    raise ValueError(f"neither rows nor columns of {matrix.shape} lie together: strides {matrix.strides}")


def _alignment(matrix: Any) -> int:
    return min(256, matrix.data.ptr & -matrix.data.ptr)


def _set(setter: Any, handle: int, attribute: int, value: int, kind: type) -> None:
    buffer = np.array([value], kind)
    setter(handle, attribute, buffer.ctypes.data, buffer.nbytes)

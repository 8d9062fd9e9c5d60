"""The CUDA kernels of traced expressions: run on the CPU, fiber by fiber, compiled by CUDA's compiler where it is
installed, and run on a GPU by `pytest -m gpu`. Float64 NumPy knows what they should compute.
"""

import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy as PLAIN  # noqa: N812, as CuPy's is
import numpy as np
import pytest
from cuda_by_numpy import ByNumPy
from cuda_numbers import Counted, in_sixteenths
from cuda_on_cpu import Library, OnCPU, amid_nan, library_of, to_gpu
from gpt_xp_backends.captured_step import TracedCache
from gpt_xp_backends.cupy_backend.kernels.products import thin_matmul
from gpt_xp_backends.cupy_backend.kernels.programs import NAME, THREADS, fused
from gpt_xp_backends.programs import Node
from gpt_xp_backends.tracing import Calls, TracedArray, Tracer
from libraries import make_backend, skipping_what_is_missing
from nvrtc import assembly, compile_for
from small_models import CONFIGS, small_params, small_tokens, tree_map

from gpt_xp import transformer as model
from gpt_xp.generation.step_functions import next_token_logits
from gpt_xp.kv_cache import KVCache, new_cache
from gpt_xp.tolerances import TOLERANCE

DTYPES = ("float16", "float32", "float64")
TOLERANCES = {
    "float16": TOLERANCE["layer", "float16"],  # computed in float and rounded once, at the end
    "float32": TOLERANCE["same", "float32"],
    "float64": TOLERANCE["same", "float64"],
}
WIDTHS = (1, 7, 131, 1031)  # one thread, a part of a block, and several columns for each thread
assert WIDTHS[2] < THREADS < WIDTHS[3]
Arrays = dict[str, Any]
Key = tuple[str, str, tuple[str, ...]]


# What stands between two products, in terms of `model`: on `Tracer` by kernels, and on `ORACLE` by NumPy. The product
# before it is given.
PRODUCT = np.empty((0, 0))


def given_product(x: Any, w: Any, scale: float = 1) -> Any:
    return x


ORACLE = SimpleNamespace(**vars(PLAIN) | {"matmul": given_product, "computed": lambda x: x})


def bias(xp: Any, a: Arrays) -> list[Any]:
    return [xp.computed(model.linear(a["x"], PRODUCT, a["bias"], xp))]


def bias_and_gelu(xp: Any, a: Arrays) -> list[Any]:
    return [xp.computed(model.gelu(model.linear(a["x"], PRODUCT, a["bias"], xp), xp))]


def mask_and_softmax(xp: Any, a: Arrays) -> list[Any]:
    weights = model.softmax(xp.matmul(a["scores"], PRODUCT) + a["mask"], xp)
    return [xp.computed(xp.astype(weights, a["x"].dtype, copy=False))]


def bias_residual_and_layer_norm(xp: Any, a: Arrays) -> list[Any]:
    x = a["residual"] + model.linear(a["x"], PRODUCT, a["bias"], xp)
    normal = xp.computed(model.layer_norm(x, a["g"], a["b"], xp=xp))
    return [xp.computed(x), normal]


def layer_norm(xp: Any, a: Arrays) -> list[Any]:
    return [xp.computed(model.layer_norm(a["residual"], a["g"], a["b"], xp=xp))]


def one_axis(xp: Any, a: Arrays) -> list[Any]:
    return [xp.computed(model.layer_norm(xp.matmul(a["bias"], PRODUCT), a["g"], a["b"], xp=xp))]


def largest_of_rows(xp: Any, a: Arrays) -> list[Any]:
    return [xp.computed(xp.max(xp.matmul(a["scores"], PRODUCT) - a["each"], axis=-1, keepdims=True))]


CASES = (bias, bias_and_gelu, mask_and_softmax, bias_residual_and_layer_norm, layer_norm, one_axis, largest_of_rows)


def numbers(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    made = amid_nan(shape, dtype)
    made[...] = np.random.RandomState(seed).standard_normal(shape)
    return made


def arrays(width: int, dtype: str) -> Arrays:
    """Prime sizes, and the strides of a row, a column, a transposed matrix, a reversed row and of heads."""
    scores = in_sixteenths(numbers(1, (2, 5, 3, width), dtype)).transpose(0, 2, 1, 3)
    scores[1] -= 300  # the exponential of any of them is 0 in float32
    mask = in_sixteenths(numbers(2, (2, 1, 5, width), "float64" if dtype == "float64" else "float32"))
    mask[0, 0, 1, width // 2 :] = np.finfo(np.float32).min
    return {
        "x": numbers(3, (5, width), dtype),
        "bias": numbers(4, (width, 3), dtype)[:, 1],
        "residual": numbers(5, (width, 5), dtype).T,
        "g": numbers(6, (width,), dtype)[::-1],
        "b": numbers(7, (width,), dtype),
        "each": numbers(8, (3, 1, 1), dtype),
        "scores": scores,
        "mask": mask,
    }


def tracer(cupy: Any) -> Tracer:
    return Tracer(PLAIN, Calls(given_product, fused(cupy)))


def run(case: Callable[..., Any], cupy: Any, given: Arrays) -> list[np.ndarray]:
    outputs = case(tracer(cupy), given)
    for out in outputs:
        assert np.isnan(np.concatenate([out.base[:4096], out.base[-4096:]])).all(), "written beside the rows"
    return outputs


def check(case: Callable[..., Any], cupy: Any, width: int, dtype: str) -> None:
    given = arrays(width, dtype)
    expected = case(ORACLE, {name: array.astype(np.float64) for name, array in given.items()})
    compare(run(case, cupy, given), expected, dtype)


def compare(outputs: list[np.ndarray], expected: list[np.ndarray], dtype: str) -> None:
    for out, right in zip(outputs, expected, strict=True):
        assert (out.shape, out.dtype) == (right.shape, dtype)
        error = np.abs(out - right).max() / np.abs(right).max()
        assert error <= TOLERANCES[dtype], f"off by {error}"


def check_nan(case: Callable[..., Any], cupy: Any, width: int, dtype: str) -> None:
    """Where one number is none, so is the row that has it, or the one element; and no other is."""
    given = arrays(width, dtype)
    clean = run(case, cupy, given)
    for name in ("x", "residual", "scores"):
        given[name][..., 1, width // 2] = np.nan
    if case is one_axis:
        given["bias"][-1] = np.nan
    for out, right, without in zip(run(case, cupy, given), case(ORACLE, given), clean, strict=True):
        assert np.isnan(right).any()
        assert (np.isnan(out) == np.isnan(right)).all(), "NaN is off by a place"
        assert (out == without)[~np.isnan(right)].all(), "off by NaN elsewhere"


def planted(case: Callable[..., Any], old: str, new: str, count: int = 1) -> tuple[Callable[..., Any], Any]:
    def change(source: str) -> str:
        changed, n = re.subn(old, new, source, count=count)
        assert n, f"{old} is not in\n{source}"
        return changed

    return case, change


NORM, SOFTMAX = bias_residual_and_layer_norm, mask_and_softmax
BUGS = {
    "no barrier after what each thread has": planted(NORM, r"(= v\d+;)\n    __syncthreads\(\);", r"\1"),
    "no barrier between halves": planted(NORM, r"\n        __syncthreads\(\);", ""),
    "a barrier for some": planted(NORM, r"(        if \(thread < others\))", r"\1 __syncthreads();\n\1"),
    "half of the threads left out": planted(NORM, "256 / 2", "256 / 4"),
    "two sums in one place": planted(NORM, r"__shared__ float shared11\[256\]", "float* shared11 = shared7"),
    "a column beyond the last": planted(bias, "i < n", "i <= n"),
    "a number beyond the row": planted(NORM, "i < n", "i <= n"),
    "the last column left out": planted(NORM, "i < n", "i < n - 1"),
    "the first columns alone": planted(NORM, r"i \+= gridDim.y \* 256", "i += n"),
    "blocks that all begin at the first column": planted(bias, r"blockIdx.y \* 256 \+", ""),
    "columns side by side": planted(NORM, r"i \* a\d_in", "i", 0),
    "rows side by side": planted(NORM, r"inner \* a\d_inner", "row * n", 0),
    "every head its own mask": planted(SOFTMAX, r"a1_outer \+ middle \* a1_middle", "a1_middle + middle * a1_outer"),
    "heads and rows in another order": planted(SOFTMAX, "row / n_inner % n_middle", "row % n_middle"),
    "the first row alone": planted(NORM, r"\(long long\)row \* n", "0"),
    "a number of another row": planted(largest_of_rows, r"middle \* a\d_middle", "0", 0),
    "the largest of nothing is 0": planted(SOFTMAX, "-1.0f / 0.0f", "0.0f"),
    "NaN is no maximum": planted(largest_of_rows, r"\|\| \S+ != \S+", "", 0),
    "sums in half precision": planted(NORM, r"__shared__ float", "__shared__ _Float16"),
    "a constant of three digits": planted(bias_and_gelu, r"(0\.797)\d+f", r"\1f"),
}  # fmt: skip


def decode(dtype: str, namespace: Callable[[], Any], n_layer: int = 2, kind: type = np.ndarray) -> np.ndarray:
    """The logits of a step after seven tokens, of two rows that begin at different slots."""
    config, params = CONFIGS["prime"], small_params("prime")
    params = tree_map(lambda leaf: leaf.astype(dtype).view(kind), params)
    params["blocks"] = params["blocks"][:n_layer]
    tokens = small_tokens("prime", 2)
    cache = new_cache(config, params["wpe"], 23, np.asarray([0, 3], dtype=np.int32), PLAIN)
    _, cache = next_token_logits(params, tokens[:, :7], cache, 7, config, PLAIN)
    # The position of a graph is an array on the device.
    position = np.full((), 7, dtype=np.int32).view(kind)
    layers, xp = [(k.view(kind), v.view(kind)) for k, v in cache.layers], namespace()
    own = (TracedCache if isinstance(xp, Tracer) else KVCache)(layers, position, cache.start)
    return next_token_logits(params, tokens[:, 7:8], own, 1, config, xp)[0]


def by_kernels(cupy: Any) -> Tracer:
    return Tracer(PLAIN, Calls(thin_matmul(cupy), fused(cupy)))


@pytest.fixture(scope="module")
def keys() -> dict[Any, list[Key]]:
    """The kernels of each case, width and dtype, and of a decode step in each dtype."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        by_numpy = ByNumPy(patch)
        cupy = SimpleNamespace(RawKernel=by_numpy, empty=amid_nan)

        def made(function: Callable[[], Any]) -> list[Key]:
            before = len(by_numpy.made)
            function()
            return by_numpy.made[before:]

        found: dict[Any, list[Key]] = {
            (case, width, dtype): made(lambda: run(case, cupy, arrays(width, dtype)))  # noqa: B023, called at once
            for case in CASES for width in WIDTHS for dtype in DTYPES
        }  # fmt: skip
        return found | {dtype: made(lambda: decode(dtype, lambda: by_kernels(cupy))) for dtype in DTYPES}  # noqa: B023


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, keys: dict[Any, list[Key]]) -> Library:
    right = [key for each in keys.values() for key in each]
    wrong = [(change(keys[case, 1031, "float32"][0][0]), NAME, ()) for case, change in BUGS.values()]
    return library_of(tmp_path_factory.mktemp("kernels"), right + wrong)


@pytest.mark.parametrize(("dtype", "backwards"), [*((dtype, False) for dtype in DTYPES), ("float32", True)])
@pytest.mark.parametrize("case", CASES)
def test_rows(library: Library, case: Callable[..., Any], dtype: str, backwards: bool) -> None:
    for width in WIDTHS:
        check(case, OnCPU(library, backwards), width, dtype)


@pytest.mark.parametrize("case", CASES)
def test_nan_stays_visible(library: Library, case: Callable[..., Any]) -> None:
    check_nan(case, OnCPU(library, backwards=False), 131, "float32")


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(library: Library, bug: str) -> None:
    case, change = BUGS[bug]

    def check_all() -> None:
        for backwards in (False, True):
            check(case, OnCPU(library, backwards, change), 1031, "float32")
        check_nan(case, OnCPU(library, backwards=False, changed=change), 1031, "float32")

    with pytest.raises(AssertionError, match=r"off by|wait for ever|written beside"):
        check_all()


def test_each_case_is_one_kernel_for_all_widths_but_where_one_divides_by_it(keys: dict[Any, list[Key]]) -> None:
    for case in CASES:
        kernels = [keys[case, width, "float32"] for width in WIDTHS]
        assert [len(each) for each in kernels] == [1] * len(WIDTHS)
        divides = "norm" in case.__name__ or case is one_axis
        assert len({source for [(source, *_)] in kernels[1:]}) == (3 if divides else 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decode_step_by_kernels_alone(library: Library, dtype: str) -> None:
    logits = decode(dtype, lambda: by_kernels(OnCPU(library, backwards=False)))
    expected = decode("float64", lambda: PLAIN)
    assert logits.dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE["logits", dtype] * np.abs(expected).max())


def launches_of_a_layer(monkeypatch: pytest.MonkeyPatch, dtype: str, make: Callable[[Any], Any]) -> int:
    """How many launches the second layer adds, of kernels here and of CuPy's functions."""
    by_numpy = ByNumPy(monkeypatch)
    cupy = SimpleNamespace(RawKernel=by_numpy, empty=lambda *args, **kwargs: np.empty(*args, **kwargs).view(Counted))
    counts = []

    def namespace() -> Any:
        Counted.n, by_numpy.launched = 0, []  # what was before is none of the step's
        return make(cupy)

    for n_layer in (1, 2):
        decode(dtype, namespace, n_layer, Counted)
        counts.append(Counted.n + len(by_numpy.launched))
    return counts[1] - counts[0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_layer_is_few_launches(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The real CuPy 14.2 launches as many, on a CUDA that computes nothing; and without a graph 53, in float16 63."""
    assert launches_of_a_layer(monkeypatch, dtype, by_kernels) == 14


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cudas_compiler_takes_all_of_a_decode_step(keys: dict[Any, list[Key]], dtype: str, architecture: str) -> None:
    kernels = [(source, options) for source, name, options in keys[dtype] if name == NAME]
    # Softmax, GELU, a shift, and layer norms: the first, the last, those in a layer and those between layers.
    assert len(kernels) == 7
    for source, options in kernels:
        assert not compile_for(architecture, source, options)


def in_double(source: str) -> str:
    return re.sub(r"(\d)f\b", r"\1", source)


def test_a_double_where_a_float_should_be_is_not_compiled(tmp_path: Any, keys: dict[Any, list[Key]]) -> None:
    [(source, name, options)] = keys[bias_and_gelu, 7, "float32"]
    with pytest.raises(AssertionError, match="double-promotion"):
        library_of(tmp_path, [(in_double(source), name, options)])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cudas_compiler_makes_no_doubles(keys: dict[Any, list[Key]], dtype: str) -> None:
    for source, _, options in keys[dtype]:
        assert ".f64" not in assembly(source, options)
    [(source, _, options)] = keys[bias_and_gelu, 7, dtype]
    assert ".f64" in assembly(in_double(source), options)


def test_cupys_arrays_leave_operators_to_traced_ones() -> None:
    with skipping_what_is_missing("cupy"):
        import cupy
    memory = cupy.cuda.MemoryPointer(
        cupy.cuda.UnownedMemory(4096, 4096, None, 0), 0
    )  # that nobody reads: no GPU needed
    array = cupy.ndarray((3, 5), np.float32, memory)
    traced = TracedArray(Node((5,), array.dtype, array=array), tracer(cupy))
    for function, result in {
        "add": array + traced,
        "subtract": array - traced,
        "multiply": array * traced,
        "divide": array / traced,
    }.items():
        assert type(result) is TracedArray
        assert (result._node.function, result.shape) == (function, (3, 5))
        assert result._node.inputs[0].array is array


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_rows_on_a_gpu(case: Callable[..., Any], dtype: str) -> None:
    make_backend("cupy", dtype)  # or skip
    cupy = sys.modules["cupy"]
    for width in WIDTHS:
        given = arrays(width, dtype)
        expected = case(ORACLE, {name: array.astype(np.float64) for name, array in given.items()})
        outputs = case(tracer(cupy), {name: to_gpu(cupy, array) for name, array in given.items()})
        compare([out.get() for out in outputs], expected, dtype)

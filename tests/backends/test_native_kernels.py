"""The kernels of `native`, each against float64, over odd shapes, compiled for three kinds of processors."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llvmlite", reason="llvmlite is not installed: pip install 'gpt-xp[native]'")

import make_polynomials
from commands import posix
from gpt_xp_backends.native_backend import attention, dots, expressions, functions, machine, packed, products
from gpt_xp_backends.native_backend.builder import KernelBuilder
from gpt_xp_backends.programs import Operation, Program
from native_targets import ARM64, CODE_TARGETS, TARGETS, VNNI

from gpt_xp.quantization import QuantizedWeight, _quantized

FLOAT32 = np.dtype(np.float32)
SEED = np.random.default_rng(3)


@functools.cache
def kernels_of(target: Any) -> machine.Kernels:
    return machine.Kernels(target, None)


def run(target: Any, name: str, text: Any, n_parts: int, *arguments: int) -> None:
    """Run a kernel in three shares, each as another thread."""
    kernel = machine.SIGNATURE(kernels_of(target).address(name, lambda: text(name, target)))
    numbers, bounds = machine.numbers(*arguments), [n_parts * i // 3 for i in range(4)]
    for thread in range(3):
        kernel(numbers.ctypes.data, thread, bounds[thread], bounds[thread + 1])


def random(*shape: int) -> Any:
    return SEED.standard_normal(shape).astype(np.float32)


def guarded(*shape: int) -> tuple[Any, Any]:
    """Return an array of ones, and a memory that has it in the middle, so that writes beside it are seen."""
    whole = np.full(int(np.prod(shape)) + 200, 7.0, np.float32)
    return whole[100:-100].reshape(shape), whole


# --- products ---------------------------------------------------------------------------------------------------------


def weight_of(kind: str, n_in: int, n_out: int, columns: int) -> tuple[packed.PackedWeight, Any]:
    """Return a packed weight, and what it stands for in float64."""
    w = random(n_in, n_out)
    if kind in ("int8", "int4"):
        codes = QuantizedWeight(*_quantized(w.T, kind))
        found = packed.pack(codes, kind, columns, 2)
    else:
        found = packed.pack(w, kind, columns, 2)
    unpacked = packed.unpack(found)
    if isinstance(unpacked, QuantizedWeight):
        assert all(np.array_equal(a, b) for a, b in zip(unpacked, codes, strict=True))
        return found, np.float64(found.columns(np.arange(n_out))).T
    assert np.array_equal(unpacked, w.astype(kind))
    return found, np.float64(unpacked)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1, 32, 7), (3, 96, 131), (4, 64, 96), (5, 160, 53), (23, 64, 97)])
def test_product(target: Any, kind: str, rows: int, n_in: int, n_out: int) -> None:
    columns = products.panel_columns(target)
    weight, expected = weight_of(kind, n_in if kind == "int4" else n_in + 1, n_out, columns)
    x = random(rows, weight.shape[0] + 3)[:, : weight.shape[0]]
    out, whole = guarded(rows, len(weight.panels) * columns)
    wide = np.empty((3, weight.shape[0], columns), np.float32)
    few = rows <= products.FEW_ROWS
    run(
        target, f"product_{kind}_{few}", lambda name, target: products.product(name, target, kind, few),
        len(weight.panels), x.ctypes.data, x.strides[0], rows, weight.panels.ctypes.data,
        0 if weight.scales is None else weight.scales.ctypes.data, out.ctypes.data, out.strides[0],
        weight.shape[0], wide.ctypes.data,
    )  # fmt: skip
    right = np.float64(x) @ expected
    assert np.abs(out[:, :n_out] - right).max() <= 2e-6 * np.abs(right).max()
    assert not out[:, n_out:].any()
    assert (whole[:100] == 7).all()
    assert (whole[-100:] == 7).all()


@pytest.mark.parametrize("target", CODE_TARGETS)
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1, 7, 5), (3, 97, 131), (4, 64, 96), (23, 131, 53)])
def test_product_of_codes_by_codes(target: Any, rows: int, n_in: int, n_out: int) -> None:
    columns, stored = products.panel_columns(target), random(n_out, n_in)
    weight = packed.pack(QuantizedWeight(*_quantized(stored, "int8")), "float32", columns, 2, rounds=True)
    codes, scale = packed.unpack(weight)
    x = random(rows, n_in + 3)[:, :n_in]
    x[0] *= 1e-3
    x[-1, n_in // 2] = 31  # One number that is much larger than the others, as trained models have.
    each = dots.row_bytes(target, n_in)
    rounded = np.zeros(rows * each, np.uint8)
    run(target, "codes", dots.codes, rows, x.ctypes.data, x.strides[0], rounded.ctypes.data, each, n_in)
    out, whole = guarded(rows, len(weight.panels) * columns)
    assert weight.scales is not None
    run(
        target, "product_w8a8", dots.product, len(weight.panels), rounded.ctypes.data, each, rows,
        weight.panels.ctypes.data, weight.scales.ctypes.data, out.ctypes.data, out.strides[0], -(-n_in // 4),
    )  # fmt: skip
    row_scale = np.abs(np.float64(x)).max(axis=1, keepdims=True) / 127
    found = np.float64(rounded.reshape(rows, each)[:, 4 : 4 + n_in]) - 128
    assert np.abs(found - x / row_scale).max() <= 0.5 + 1e-4  # Near the middle between two codes, either is right.
    right = found @ np.float64(codes).T * row_scale * np.float64(scale)
    assert (np.abs(out[:, :n_out] - right) <= 1e-6 * np.abs(right).max(axis=1, keepdims=True)).all()
    assert not out[:, n_out:].any()
    assert (whole[:100] == 7).all()
    assert (whole[-100:] == 7).all()


@pytest.mark.parametrize("target", CODE_TARGETS)
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1, 32, 5), (3, 96, 131), (4, 64, 96), (23, 160, 53)])
def test_product_of_codes_by_int4(target: Any, rows: int, n_in: int, n_out: int) -> None:
    columns = products.panel_columns(target)
    stored = QuantizedWeight(*_quantized(random(n_out, n_in), "int4"))
    weight = packed.pack(stored, "float32", columns, 2, rounds=True)
    assert all(np.array_equal(a, b) for a, b in zip(packed.unpack(weight), stored, strict=True))
    exact = np.float64(weight.columns(np.arange(n_out))).T
    x = random(rows, n_in + 3)[:, :n_in]
    x[-1, 17] = 31  # One number that is much larger than the others spoils its own group alone.
    each = dots.group_row_bytes(n_in)
    rounded = np.zeros(rows * each, np.uint8)
    run(
        target,
        "group_codes",
        dots.group_codes,
        rows,
        x.ctypes.data,
        x.strides[0],
        rounded.ctypes.data,
        each,
        n_in // 32,
    )
    out, whole = guarded(rows, len(weight.panels) * columns)
    assert weight.scales is not None
    run(
        target, "product_w4a8", dots.product_int4, len(weight.panels), rounded.ctypes.data, each, rows,
        weight.panels.ctypes.data, weight.scales.ctypes.data, out.ctypes.data, out.strides[0], n_in // 32,
    )  # fmt: skip
    groups = np.float64(x).reshape(rows, -1, 32)
    scale = np.abs(groups).max(axis=2, keepdims=True) / 127
    found = np.float64(rounded.reshape(rows, -1, 40)[:, :, 8:].view(np.int8))
    assert np.abs(found - groups / scale).max() <= 0.5 + 1e-4  # Near the middle between two codes, either is right.
    right = (found * scale).reshape(rows, n_in) @ exact
    assert (np.abs(out[:, :n_out] - right) <= 2e-6 * np.abs(right).max(axis=1, keepdims=True)).all()
    assert not out[:, n_out:].any()
    assert (whole[:100] == 7).all()
    assert (whole[-100:] == 7).all()
    x[0, 5] = np.nan
    run(
        target,
        "group_codes",
        dots.group_codes,
        rows,
        x.ctypes.data,
        x.strides[0],
        rounded.ctypes.data,
        each,
        n_in // 32,
    )
    assert np.isnan(rounded[:4].view(np.float32)[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [2, 18])
def test_a_row_that_is_not_finite_gets_such_a_scale(target: Any, bad: float, place: int) -> None:
    x, each = np.zeros((3, 19), np.float32), dots.row_bytes(target, 19)
    x[0, place] = bad
    x[1, place] = 127
    rounded = np.zeros((3, each), np.uint8)
    run(target, "codes", dots.codes, 3, x.ctypes.data, x.strides[0], rounded.ctypes.data, each, 19)
    first, second, zero = np.ascontiguousarray(rounded[:, :4]).view(np.float32)[:, 0]
    assert np.isnan(first)
    assert second == 1
    assert 0 <= zero < 1e-30
    assert rounded[1, 4 + place] == 255
    assert (np.delete(rounded[1:, 4:23], place, axis=1) == 128).all()
    assert (rounded[2, 4:23] == 128).all()


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("batch", "n_head", "n_seq", "n_slots", "d_head"),
    [(2, 3, 1, 7, 5), (1, 2, 3, 37, 64), (2, 1, 5, 61, 40), (2, 3, 7, 61, 5), (1, 2, 70, 101, 64), (3, 1, 67, 131, 96),
     (1, 1, 6, 6, 1)],
)  # fmt: skip
def test_attention(target: Any, batch: int, n_head: int, n_seq: int, n_slots: int, d_head: int) -> None:
    q = random(batch, n_seq, 3, n_head, d_head)[:, :, 0].transpose(0, 2, 1, 3)
    k, v = random(batch * n_head, n_slots + 5, d_head), random(batch * n_head, n_slots + 5, d_head)
    visible = np.arange(n_slots) <= np.arange(n_seq)[:, None] + min(3, n_slots - n_seq)
    visible = np.broadcast_to(visible, (batch, 1, n_seq, n_slots)).copy()
    visible[-1, :, :, :2] = n_seq == 1  # A row with padding: its first query sees nothing, and must not become NaN.
    mask = np.where(visible, 0, np.finfo(np.float32).min).astype(np.float32)
    out, whole = guarded(batch, n_seq, n_head, d_head)
    to = out.transpose(0, 2, 1, 3)
    few = n_seq <= attention.MAX_FEW
    bytes_each = attention.scratch_bytes(target, n_seq, n_slots, d_head)
    memory, layer = np.empty(3 * bytes_each, np.uint8), machine.numbers(k.ctypes.data, v.ctypes.data, k.strides[0])
    run(
        target, f"attention_{d_head}_{few}", lambda name, target: attention.attention(name, target, d_head, few),
        batch * n_head * (1 if few else -(-n_seq // attention.BLOCK)), q.ctypes.data, *q.strides[:3],
        layer.ctypes.data, mask.ctypes.data, mask.strides[0], mask.strides[2],
        to.ctypes.data, *to.strides[:3], n_head, n_seq, n_slots, memory.ctypes.data, bytes_each,
        int(np.float32(d_head**-0.5).view(np.int32)),
    )  # fmt: skip
    keys, values = (np.float64(x).reshape(batch, n_head, -1, d_head)[:, :, :n_slots] for x in (k, v))
    scores = np.float64(q) @ keys.swapaxes(-1, -2) * d_head**-0.5 + mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ values
    sees = visible.any(axis=-1)[..., None] & np.ones(expected.shape, bool)
    assert np.isfinite(to).all()
    assert np.abs(to - expected)[sees].max() <= 3e-6 * np.abs(expected).max()
    assert (whole[:100] == 7).all()
    assert (whole[-100:] == 7).all()


# --- expressions ------------------------------------------------------------------------------------------------------


def evaluated(target: Any, program: Program, *arrays: Any, width: int) -> list[Any]:
    """Return the results of a program in float32, each with guards around it."""
    rows = max(len(x) for x in arrays)
    places = [n for x in arrays for n in (x.ctypes.data, x.strides[0] if len(x) > 1 or rows == 1 else 0)]
    outputs, wholes = [], []
    for number in program.outputs:
        is_row = program.operations[number - len(program.given)].is_row
        out, whole = guarded(rows, 1 if is_row else width)
        outputs.append(out)
        wholes.append(whole)
    places += [n for out in outputs for n in (out.ctypes.data, out.strides[0])]
    kept = 4 * width * expressions.n_kept(program)
    memory = np.empty(3 * kept + 64, np.uint8)
    run(
        target, "expression_" + str(abs(hash(program))),
        lambda name, target: expressions.expression(name, target, program), rows, *places, width, memory.ctypes.data,
        kept,
    )  # fmt: skip
    for whole in wholes:
        assert (whole[:100] == 7).all()
        assert (whole[-100:] == 7).all()
    return outputs


def operation(function: str, *inputs: int | float, is_row: bool = False) -> Operation:
    return Operation(function, inputs, FLOAT32, is_row)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [1, 7, 16, 131])
def test_softmax(target: Any, width: int) -> None:
    program = Program(
        ((FLOAT32, False),),
        (operation("max", 0, is_row=True), operation("subtract", 0, 1), operation("exp", 2),
         operation("sum", 3, is_row=True), operation("divide", 3, 4)), (5,),
    )  # fmt: skip
    x = 9 * random(5, width)
    [found] = evaluated(target, program, x, width=width)
    powers = np.exp(np.float64(x) - x.max(axis=1, keepdims=True))
    # The difference is rounded before exp, which makes the rounding 30 times as large.
    np.testing.assert_allclose(found, powers / powers.sum(axis=1, keepdims=True), rtol=4e-6, atol=1e-30)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [7, 48, 131])
def test_layer_norm_with_a_residual_that_is_kept(target: Any, width: int) -> None:
    """Two results, one of them read again by later loops; one array for all rows, one number for each row."""
    program = Program(
        ((FLOAT32, False), (FLOAT32, False), (FLOAT32, False), (FLOAT32, True)),
        (
            operation("add", 0, 1), operation("sum", 4, is_row=True), operation("divide", 5, float(width), is_row=True),
            operation("subtract", 4, 6), operation("multiply", 7, 7), operation("sum", 8, is_row=True),
            operation("divide", 9, float(width), is_row=True), operation("add", 10, 1e-5, is_row=True),
            operation("sqrt", 11, is_row=True), operation("divide", 7, 12), operation("multiply", 2, 13),
            operation("add", 14, 3), operation("multiply", 15, 0.5),
        ),
        (4, 16, 12),
    )  # fmt: skip
    x, y, g, b = random(5, width), random(5, width), random(1, width), random(5, 1)
    kept, normed, deviation = evaluated(target, program, x, y, g, b, width=width)
    total = np.float64(x) + y
    centered = total - total.mean(axis=1, keepdims=True)
    scale = np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(kept, total, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(deviation, scale, rtol=1e-6)
    np.testing.assert_allclose(normed, (g * (centered / scale) + b) * 0.5, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("function", "low", "high"), [("exp", -87.3, 88.7), ("tanh", -11, 11), ("tanh", -1e-3, 1e-3)])
def test_functions_are_good_to_the_rounding_of_float32(target: Any, function: str, low: float, high: float) -> None:
    x = np.linspace(low, high, 100_001, dtype=np.float32)[None]
    program = Program(((FLOAT32, False),), (operation(function, 0),), (1,))
    [found] = evaluated(target, program, x, width=x.shape[1])
    right = getattr(np, function)(np.float64(x))
    bits = np.float64(np.spacing(np.abs(right).astype(np.float32)))
    assert (np.abs(found - right) / bits).max() <= 3  # units in the last place; NumPy's own have up to 3


def test_the_polynomials_are_those_that_the_script_finds() -> None:
    for found, (expected, error), limit in (
        (functions.EXP[:-2], make_polynomials.exp(), 4e-9),
        (functions.TANH, make_polynomials.tanh(functions.TANH_LIMIT), 5e-9),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert error < limit


@pytest.mark.parametrize("target", TARGETS)
def test_functions_at_their_ends(target: Any) -> None:
    x = np.array([[-np.inf, -3e38, -88, 0, 89, 3e38, np.inf, np.nan]], np.float32)
    for function in ("exp", "tanh"):
        program = Program(((FLOAT32, False),), (operation(function, 0),), (1,))
        [found] = evaluated(target, program, x, width=8)
        with np.errstate(over="ignore", under="ignore"):
            right = getattr(np, function)(x)
        np.testing.assert_array_equal(found, np.where(right < 1e-37, np.minimum(right, 0), right))


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n_seq", [1, 3])
def test_keys_and_values_go_to_their_slots(target: Any, n_seq: int) -> None:
    batch, n_head, d_head, n_slots, position = 2, 3, 5, 11, np.full((), 11 + 7, np.int32)
    new = random(batch, n_seq, 3, n_head, d_head).transpose(2, 0, 3, 1, 4)
    slots = [np.full((batch * n_head, n_slots + 4, d_head), 7, np.float32) for _ in range(2)]
    layer = machine.numbers(slots[0].ctypes.data, slots[1].ctypes.data, slots[0].strides[0])
    run(
        target, "put", attention.put, batch * n_head, layer.ctypes.data, new[1].ctypes.data, new[2].ctypes.data,
        *new[1].strides[:3], n_head, n_seq, d_head, n_slots, position.ctypes.data,
    )  # fmt: skip
    for each, whole in zip(new[1:], slots, strict=True):
        assert np.array_equal(whole[:, 7 : 7 + n_seq], each.reshape(batch * n_head, n_seq, d_head))
        assert (np.delete(whole, range(7, 7 + n_seq), axis=1) == 7).all()


# --- compiling --------------------------------------------------------------------------------------------------------


def initialize_all_targets() -> None:
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()


def test_kernels_are_compiled_for_arm64_too() -> None:
    """None has run there."""
    initialize_all_targets()
    for name, text in (
        ("product", products.product("product", ARM64, "float16", True)),
        ("w8a8", dots.product("w8a8", ARM64)),
        ("w4a8", dots.product_int4("w4a8", ARM64)),
        ("many", products.product("many", ARM64, "int4", False)),
        ("attention", attention.attention("attention", ARM64, 64, True)),
    ):
        code = machine.object_code(text, ARM64)
        assert code[:4] == b"\x7fELF", name
        assert code[18] == 183, name  # EM_AARCH64


def test_products_of_codes_are_compiled_for_avx2_with_vnni() -> None:
    """They run where the processor has it: see `CODE_TARGETS`."""
    initialize_all_targets()
    target = dataclasses.replace(VNNI, triple="x86_64-unknown-linux-gnu")
    for name, text in (("w8a8", dots.product("w8a8", target)), ("w4a8", dots.product_int4("w4a8", target))):
        assert "vpdpbusd.256" in text, name
        assert machine.object_code(text, target)[:4] == b"\x7fELF", name


def test_compiled_kernels_are_found_on_disk(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def text() -> str:
        return KernelBuilder("nothing", machine.this_processor()).text()

    assert machine.Kernels(machine.this_processor(), tmp_path).address("nothing", text)
    [file] = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(machine, "object_code", lambda *args: pytest.fail("it was compiled again"))
        assert machine.Kernels(machine.this_processor(), tmp_path).address("nothing", text)
    before = file.read_bytes()
    for damaged in (b"", before[:-1], before[:40] + b"\0" + before[41:]):
        file.write_bytes(damaged)
        assert machine.Kernels(machine.this_processor(), tmp_path).address("nothing", text)
        assert file.read_bytes() == before
    machine.Kernels(machine.Target(machine.this_processor().triple, "x86-64", ""), tmp_path)._path("nothing")
    assert machine.Kernels(machine.this_processor(), file / "a file is no folder").address("nothing", text)


@posix
def test_code_that_others_could_have_written_is_not_run(tmp_path: Any) -> None:
    folder = tmp_path / "kernels"
    made = machine.Kernels(machine.this_processor(), folder)
    made.address("nothing", lambda: KernelBuilder("nothing", machine.this_processor()).text())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert made._found("nothing")
    folder.chmod(0o777)
    assert made._found("nothing") is None

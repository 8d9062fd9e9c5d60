"""Writes kernels as LLVM IR. `Value` lets a kernel be written with Python's operators."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from gpt_xp_backends.native_backend.machine import Target
from gpt_xp_backends.native_backend.value import Value, Variable

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


class KernelBuilder:
    """Builds one kernel. `width` is how many float32 numbers a vector has on the target."""

    def __init__(self, name: str, target: Target) -> None:
        self.target, self.width = target, target.width
        self.module = ir.Module(name)
        kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
        function = ir.Function(self.module, kind, name)
        self.ir = ir.IRBuilder(function.append_basic_block())
        self._arguments, self.thread, self._begin, self._end = (Value(self, each) for each in function.args)
        self._n_arguments = 0
        self._intrinsics: dict[str, Any] = {}

    def text(self) -> str:
        """End the kernel, and return its LLVM IR."""
        self.ir.ret_void()
        return str(self.module)

    # --- numbers ---

    def arguments(self, n: int) -> list[Value]:
        """Return the next `n` arguments, each an int64."""
        places = range(self._n_arguments, self._n_arguments + n)
        self._n_arguments += n
        return [self.load(self._arguments + 8 * place, I64) for place in places]

    def float_argument(self) -> Value:
        """Return the next argument, of which the low 32 bits are a float32."""
        self._n_arguments += 1
        return self.load(self._arguments + 8 * (self._n_arguments - 1), F32)

    def integer(self, value: int) -> Value:
        """Return an int64."""
        return Value(self, I64(value))

    def vector(self, value: float, width: int | None = None) -> Value:
        """Return a vector of equal float32 numbers."""
        kind = ir.VectorType(F32, width or self.width)
        return Value(self, ir.Constant(kind, [float(np.float32(value))] * kind.count))

    def like(self, value: Value, other: Any) -> Value:
        """Return a Python number as a value of the same type, and a value as it is."""
        if isinstance(other, Value):
            return other
        kind, number = value.ir.type, float(np.float32(other)) if value.is_float else int(other)
        return Value(self, ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number))

    def variable(self, first: Value) -> Variable:
        """Return a variable with its first value."""
        return Variable(self, first)

    # --- memory ---

    def load(self, address: Value, kind: Any = None) -> Value:
        """Load a vector of float32, or another type. The address need not be aligned."""
        kind = kind or ir.VectorType(F32, self.width)
        return Value(self, self.ir.load(self._pointer(address, kind), align=1 if kind != I64 else 8))

    def store(self, value: Value, address: Value) -> None:
        """Store a value. The address need not be aligned."""
        self.ir.store(value.ir, self._pointer(address, value.ir.type), align=1)

    def load_first(self, address: Value, n: int | Value, other: float = 0.0) -> Value:
        """Load a vector of which only the first `n` numbers are in memory. The rest are `other`."""
        mask, kind = self._first(n), ir.VectorType(F32, self.width)
        load = self._intrinsic(
            "masked.load", kind, [kind.as_pointer(), I32, mask.ir.type, kind], f"v{self.width}f32.p0"
        )
        rest = self.vector(other)
        return Value(self, self.ir.call(load, [self._pointer(address, kind), I32(4), mask.ir, rest.ir]))

    def store_first(self, value: Value, address: Value, n: int | Value) -> None:
        """Store the first `n` numbers of a vector."""
        mask, kind = self._first(n), value.ir.type
        types = [kind, kind.as_pointer(), I32, mask.ir.type]
        store = self._intrinsic("masked.store", ir.VoidType(), types, f"v{self.width}f32.p0")
        self.ir.call(store, [value.ir, self._pointer(address, kind), I32(4), mask.ir])

    def select_first(self, n: Value, x: Value, other: float) -> Value:
        """Return the first `n` numbers of a vector, and `other` in place of the rest."""
        return self.select(self._first(n), x, other)

    def _first(self, n: int | Value) -> Value:
        kind = ir.VectorType(I32, self.width)
        places = Value(self, ir.Constant(kind, list(range(self.width))))
        if isinstance(n, int):
            return places < n
        return places < self.splat(Value(self, self.ir.trunc(n.ir, I32)))

    def _pointer(self, address: Value, kind: Any) -> Any:
        return self.ir.inttoptr(address.ir, kind.as_pointer())

    # --- control ---

    @contextlib.contextmanager
    def loop(self, begin: int | Value, end: int | Value, step: int = 1) -> Iterator[Value]:
        """Repeat what stands inside with each of `range(begin, end, step)`."""
        begin, end = (each if isinstance(each, Value) else self.integer(each) for each in (begin, end))
        place = self.variable(begin)
        head, body, after = (self.ir.append_basic_block() for _ in range(3))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        self.ir.cbranch((place.value < end).ir, body, after)
        self.ir.position_at_end(body)
        index = place.value
        yield index
        place.value = index + step
        self.ir.branch(head)
        self.ir.position_at_end(after)

    def shared_loop(self) -> Any:
        """Repeat what stands inside for each part of the work that this call is to do."""
        return self.loop(self._begin, self._end)

    def pause(self) -> None:
        """Tell the processor that a loop waits for another thread."""
        name, arguments = ("x86.sse2.pause", []) if self.target.is_x86 else ("aarch64.hint", [I32(1)])
        function = self._intrinsic(name, ir.VoidType(), [each.type for each in arguments], "")
        self.ir.call(function, arguments)

    def when(self, condition: Value) -> Any:
        """Do what stands inside only if the condition holds."""
        return self.ir.if_then(condition.ir)

    def select(self, condition: Value, yes: Value, no: Any) -> Value:
        """Return one of two values, element by element."""
        return Value(self, self.ir.select(condition.ir, yes.ir, self.like(yes, no).ir))

    def smaller(self, x: Value, y: Any) -> Value:
        """Return the smaller of two values, element by element."""
        return self.select(x < y, x, y)

    def larger(self, x: Value, y: Any) -> Value:
        """Return the larger of two values, element by element."""
        return self.select(x > y, x, y)

    # --- vectors ---

    def splat(self, value: Value, width: int | None = None) -> Value:
        """Return a vector of one number repeated."""
        kind = ir.VectorType(value.ir.type, width or self.width)
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.ir.insert_element(undefined, value.ir, I32(0))
        return Value(self, self.ir.shuffle_vector(first, undefined, _order([0] * kind.count)))

    def shuffle(self, x: Value, y: Value, order: Sequence[int]) -> Value:
        """Return the numbers of two vectors in this order."""
        return Value(self, self.ir.shuffle_vector(x.ir, y.ir, _order(order)))

    def first(self, x: Value) -> Value:
        """Return the first number of a vector."""
        return Value(self, self.ir.extract_element(x.ir, I32(0)))

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """Return x * y + z, rounded once where the processor can."""
        if not self.target.has_fma:
            return x * y + z
        kind = x.ir.type
        function = self._intrinsic("fma", kind, [kind] * 3, f"v{kind.count}f32")
        return Value(self, self.ir.call(function, [x.ir, y.ir, z.ir]))

    def sqrt(self, x: Value) -> Value:
        """Return the square roots."""
        kind = x.ir.type
        return Value(self, self.ir.call(self._intrinsic("sqrt", kind, [kind], f"v{kind.count}f32"), [x.ir]))

    def looked_up(self, table: Value, places: Value) -> Value:
        """Return the numbers of a vector of 16 at these places, of which the low 4 bits count. AVX-512 alone has it."""
        function = self._intrinsic("x86.avx512.permvar.sf", table.ir.type, [table.ir.type, places.ir.type], "512")
        return Value(self, self.ir.call(function, [table.ir, places.ir]))

    def dots(self, total: Value, unsigned: Value, signed: Value) -> Value:
        """Return int32 totals plus the products of four unsigned and four signed bytes. VNNI alone has it."""
        kind = total.ir.type
        function = self._intrinsic("x86.avx512.vpdpbusd", kind, [kind] * 3, str(32 * self.width))
        return Value(self, self.ir.call(function, [total.ir, unsigned.ir, signed.ir]))

    def all_sum(self, x: Value) -> Value:
        """Return a vector with the sum of all numbers of a vector."""
        return self._folded(x, lambda x, y: x + y)

    def all_max(self, x: Value) -> Value:
        """Return a vector with the largest number of a vector."""
        return self._folded(x, self.larger)

    def _folded(self, x: Value, function: Callable[[Value, Value], Value]) -> Value:
        distance = self.width // 2
        while distance:
            x = function(x, self.shuffle(x, x, [(i + distance) % self.width for i in range(self.width)]))
            distance //= 2
        return x

    def sums(self, vectors: Sequence[Value]) -> Value:
        """Return a vector with the sum of each of `width` vectors."""
        found, half = list(vectors), 1
        while len(found) > 1:
            found = [self._halved(x, y, half) for x, y in zip(found[::2], found[1::2], strict=True)]
            half *= 2
        return found[0]

    def _halved(self, x: Value, y: Value, n: int) -> Value:
        """Add neighbouring numbers of x and of y: in each group of 2 * n, the sums of x come first."""
        width = self.width
        groups = range(0, width, 2 * n)
        low = [place for g in groups for place in (*range(g, g + n), *range(width + g, width + g + n))]
        high = [place + n for place in low]
        return self.shuffle(x, y, low) + self.shuffle(x, y, high)

    def transposed(self, vectors: Sequence[Value]) -> list[Value]:
        """Return the transpose of a square of numbers: `width` vectors."""
        found, half = list(vectors), self.width // 2
        while half:
            for i in (i for i in range(self.width) if not i & half):
                x, y, order = found[i], found[i + half], range(self.width)
                low = [place if not place & half else self.width + place - half for place in order]
                high = [place + half if not place & half else self.width + place for place in order]
                found[i], found[i + half] = self.shuffle(x, y, low), self.shuffle(x, y, high)
            half //= 2
        return found

    def _intrinsic(self, name: str, result: Any, types: list[Any], suffix: str) -> Any:
        full = f"llvm.{name}.{suffix}".rstrip(".")
        if full not in self._intrinsics:
            self._intrinsics[full] = ir.Function(self.module, ir.FunctionType(result, types), full)
        return self._intrinsics[full]


def _order(places: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(I32, len(places)), list(places))

"""Values of a kernel that is being written: Python's operators on them make instructions."""

from typing import TYPE_CHECKING, Any

from llvmlite import ir

if TYPE_CHECKING:
    from gpt_xp_backends.native_backend.builder import KernelBuilder


class Value:
    """A number or a vector of the kernel. Arithmetic with it makes instructions."""

    __slots__ = ("ir", "kernel")

    def __init__(self, kernel: "KernelBuilder", value: Any) -> None:
        self.kernel, self.ir = kernel, value

    @property
    def is_float(self) -> bool:
        """Whether it is, or holds, floating-point numbers."""
        return isinstance(element(self.ir.type), ir.FloatType | ir.HalfType)

    def _apply(self, names: tuple[str, str], other: Any, after: bool = False) -> "Value":
        other = self.kernel.like(self, other)
        left, right = (other, self) if after else (self, other)
        return Value(self.kernel, getattr(self.kernel.ir, names[not self.is_float])(left.ir, right.ir))

    def __add__(self, other: Any) -> "Value":
        return self._apply(("fadd", "add"), other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Value":
        return self._apply(("fsub", "sub"), other)

    def __rsub__(self, other: Any) -> "Value":
        return self._apply(("fsub", "sub"), other, after=True)

    def __mul__(self, other: Any) -> "Value":
        return self._apply(("fmul", "mul"), other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Value":
        return self._apply(("fdiv", ""), other)

    def __rtruediv__(self, other: Any) -> "Value":
        return self._apply(("fdiv", ""), other, after=True)

    def __floordiv__(self, other: Any) -> "Value":
        return self._apply(("", "sdiv"), other)

    def __mod__(self, other: Any) -> "Value":
        return self._apply(("", "srem"), other)

    def __and__(self, other: Any) -> "Value":
        return self._apply(("", "and_"), other)

    def __or__(self, other: Any) -> "Value":
        return self._apply(("", "or_"), other)

    def __lshift__(self, other: Any) -> "Value":
        return self._apply(("", "shl"), other)

    def __rshift__(self, other: Any) -> "Value":
        return self._apply(("", "lshr"), other)

    def __lt__(self, other: Any) -> "Value":
        return self._compare("<", other)

    def __gt__(self, other: Any) -> "Value":
        return self._compare(">", other)

    def __ge__(self, other: Any) -> "Value":
        return self._compare(">=", other)

    def _compare(self, sign: str, other: Any) -> "Value":
        compare = self.kernel.ir.fcmp_ordered if self.is_float else self.kernel.ir.icmp_signed
        return Value(self.kernel, compare(sign, self.ir, self.kernel.like(self, other).ir))


class Variable:
    """A value that a loop changes. LLVM keeps it in a register."""

    def __init__(self, kernel: "KernelBuilder", first: Value) -> None:
        self._kernel = kernel
        with kernel.ir.goto_entry_block():
            self._place = kernel.ir.alloca(first.ir.type)
        self.value = first

    @property
    def value(self) -> Value:
        """The value now."""
        return Value(self._kernel, self._kernel.ir.load(self._place))

    @value.setter
    def value(self, value: Value) -> None:
        self._kernel.ir.store(value.ir, self._place)


def element(kind: Any) -> Any:
    """Return the type of the numbers of a vector, or of a number."""
    return kind.element if isinstance(kind, ir.VectorType) else kind

"""exp and tanh of vectors of float32, good to the rounding of float32."""

import math
from collections.abc import Sequence

from llvmlite import ir

from gpt_xp_backends.native_backend.builder import I32, KernelBuilder
from gpt_xp_backends.native_backend.value import Value

# log(2) in two parts. A whole number of up to 8 bits times the first is exact in float32.
LOG2_HIGH = round(math.log(2) * 2**12) / 2**12
LOG2_LOW = math.log(2) - LOG2_HIGH
# exp(r) = 1 + r + r^2 * p(r) for |r| < log(2) / 2, with a relative error of at most 4e-9; and
# tanh(x) = x + x^3 * p(x^2) for |x| < 0.625, of at most 5e-9: least squares, weighted until all maxima are equal.
EXP = (0.0013811661, 0.0083701341, 0.041668528, 0.16666509, 0.49999993, 1.0, 1.0)
TANH = (-0.005704986, 0.020639087, -0.053739715, 0.133314422, -0.333332819)
TANH_LIMIT = 0.625
LARGEST = 88.72  # exp of more is infinity in float32.


def exp(k: KernelBuilder, x: Value) -> Value:
    """Return the exponentials, to float32's rounding: 0 below -87.3, infinity above 88.72, and NaN of NaN."""
    is_small, is_large = x < -87.3, x > LARGEST
    x = k.select(is_small, k.vector(-87.3), k.select(is_large, k.vector(LARGEST), x))
    # x = n * log(2) + r with |r| <= log(2) / 2. Adding 1.5 * 2^23 rounds to a whole number, in the low bits.
    shifted = k.fma(x, k.like(x, 1 / math.log(2)), k.like(x, 1.5 * 2**23))
    n = shifted - 1.5 * 2**23
    r = k.fma(n, k.like(x, -LOG2_HIGH), x)
    r = k.fma(n, k.like(x, -LOG2_LOW), r)
    p = polynomial(k, r, EXP)
    bits = Value(k, k.ir.bitcast(shifted.ir, ir.VectorType(I32, x.ir.type.count))) << 23
    one = Value(k, k.ir.bitcast(p.ir, bits.ir.type)) + bits
    result = k.select(is_large, k.vector(math.inf), Value(k, k.ir.bitcast(one.ir, x.ir.type)))
    return k.select(is_small, k.vector(0), result)


def tanh(k: KernelBuilder, x: Value) -> Value:
    """Return the hyperbolic tangents, to float32's rounding."""
    size = k.larger(x, 0.0 - x)
    square = x * x
    small = k.fma(x * square, polynomial(k, square, TANH), x)
    e = exp(k, size * -2.0)
    large = (1.0 - e) / (1.0 + e)
    large = k.select(x < 0.0, 0.0 - large, large)
    return k.select(size < TANH_LIMIT, small, large)


def polynomial(k: KernelBuilder, x: Value, coefficients: Sequence[float]) -> Value:
    """Return the polynomial with these coefficients, the highest power first (Horner's scheme)."""
    result = k.like(x, coefficients[0])
    for each in coefficients[1:]:
        result = k.fma(result, x, k.like(x, each))
    return result

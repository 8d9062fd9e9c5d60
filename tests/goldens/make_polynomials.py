"""Find the coefficients of exp and tanh in `native_backend/functions.py`: `python tests/goldens/make_polynomials.py`.

Least squares on Chebyshev's points. The weight of each grows by its error, until all maxima are equal (Lawson 1961).
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def fitted(wanted: Any, error_of_one: Any, points: Any, n_coefficients: int) -> tuple[Any, float]:
    """Return coefficients, the highest power first, and the largest error in units of `error_of_one`."""
    powers = points[:, None] ** np.arange(n_coefficients) * error_of_one[:, None]
    right, weights = wanted * error_of_one, np.ones(len(points))
    for _ in range(200):
        root = np.sqrt(weights)[:, None]
        found, *_ = np.linalg.lstsq(powers * root, right * root[:, 0], rcond=None)
        errors = np.abs(powers @ found - right)
        weights *= errors + 1e-300
        weights /= weights.sum()
    return found[::-1], float(errors.max())


def chebyshev(low: float, high: float) -> Any:
    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(4001) + 0.5) / 4001)


def series(near: Callable[[Any], Any], far: Callable[[Any], Any], x: Any, limit: float) -> Any:
    """Return a function by its series where |x| is small, and as it stands elsewhere."""
    with np.errstate(all="ignore"):
        return np.where(np.abs(x) < limit, near(x), far(x))


def exp() -> tuple[Any, float]:
    """Return p of exp(r) = 1 + r + r^2 * p(r), and its largest relative error."""
    r = chebyshev(-1.02 * np.log(2) / 2, 1.02 * np.log(2) / 2)
    p = series(lambda r: 0.5 + r / 6 + r * r / 24 + r**3 / 120, lambda r: (np.expm1(r) - r) / r**2, r, 1e-3)
    return fitted(p, r * r * np.exp(-r), r, 5)


def tanh(limit: float = 0.625) -> tuple[Any, float]:
    """Return p of tanh(x) = x + x^3 * p(x^2) for |x| < limit, and its largest relative error."""
    s = chebyshev(0, limit**2)
    x = np.sqrt(s)
    p = series(lambda s: -1 / 3 + 2 * s / 15 - 17 * s * s / 315, lambda s: (np.tanh(x) - x) / (x * s), s, 1e-4)
    return fitted(p, s * x / np.tanh(x), s, 5)


if __name__ == "__main__":
    for name, (coefficients, error) in {"exp": exp(), "tanh": tanh()}.items():
        print(name, ", ".join(f"{each:.9g}" for each in coefficients), f"error {error:.1e}")

"""Computes rows together, and halves a batch in which the model fails until the failing row is alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from gpt_xp.errors import DeviceMemoryError, NumericalError

Row = TypeVar("Row")
Results = TypeVar("Results")


def halved(
    rows: Sequence[Row], compute: Callable[[Sequence[Row]], Results]
) -> Iterator[tuple[Sequence[Row], Results | DeviceMemoryError | NumericalError]]:
    """Yield parts of `rows`, in order, each with the results of `compute`; a row that fails alone has its error."""
    try:
        results = compute(rows)
    except (DeviceMemoryError, NumericalError) as error:  # Perhaps only one of the rows causes it.
        if len(rows) == 1:
            yield rows, error
            return
    else:
        yield rows, results
        return
    yield from halved(rows[: len(rows) // 2], compute)
    yield from halved(rows[len(rows) // 2 :], compute)

"""NumPy as it is."""

from typing import Any

from wrong_backends import NumPyWith


class RightNumPy(NumPyWith):
    """NumPy as it is."""

    name = "right-numpy"

    def __init__(self, **settings: Any) -> None:
        super().__init__({}, **settings)

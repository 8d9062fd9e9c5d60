"""Read a server's answer to a range request (RFC 9110): its status, its range of bytes, the time of a retry."""

import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import requests

_NUMBER = "[0-9]{1,18}"  # Servers write a number of bytes so.
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_HINTS = {
    401: ": it wants a token (HF_TOKEN), or does not know the one that it got",
    403: ": it does not let this address, or this token, have the file",
    404: ": it does not have the file",
}


def is_worth_another_try(status: int, was_redirected: bool) -> bool:
    """Return whether the same request may succeed later."""
    return status in _TRY_AGAIN or (status == 403 and was_redirected)  # A signed address may have expired.


def describe_status(status: int) -> str:
    """Return a status and its standard name. The server's own text is not safe to show on a terminal."""
    return f"{status} {HTTPStatus(status).phrase}" if status in list(HTTPStatus) else str(status)


def hint_for(status: int) -> str:
    """Return a hint at the cause of a status, to be added to its description; "" where there is none."""
    return _HINTS.get(status, "")


def retry_after(response: "requests.Response") -> float | None:
    """Return the seconds that the server asks to wait, or None."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    from email.utils import parsedate_to_datetime

    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def content_length(response: "requests.Response") -> int | None:
    """Return the number of bytes of the body, or None where the server does not send it."""
    value = response.headers.get("Content-Length", "")
    return int(value) if re.fullmatch(_NUMBER, value) else None


def content_range(response: "requests.Response") -> tuple[int | None, int | None]:
    """Return where the bytes of a part begin, and the size of the whole file; None for what is unknown."""
    found = re.fullmatch(rf"bytes ({_NUMBER})-\d+/({_NUMBER}|\*)", response.headers.get("Content-Range", ""))
    if not found:
        return None, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def unsatisfied_range_size(response: "requests.Response") -> int | None:
    """Return the size of the whole file from an answer 416, or None."""
    found = re.fullmatch(rf"bytes \*/({_NUMBER})", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None

"""Parses all JSON that gpt-xp reads, so that bad text is always one clear error."""

import json
from collections import Counter
from typing import Any

from gpt_xp.errors import JsonError, JsonLimitError

MAX_DEPTH = 100  # levels; Python's parser fails at a few thousand, depending on its version and its caller


def parse(text: str | bytes, *, unique: bool = False) -> Any:
    """Return the value of JSON text. Bytes are decoded as UTF-8, with or without a byte order mark.

    Raises `JsonError` for text that is not JSON and, with `unique`, for an object with duplicate names. Raises
    `JsonLimitError` for more than `MAX_DEPTH` levels, and for an integer with more digits than Python reads.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(decoded, object_pairs_hook=_unique if unique else None)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JsonError(str(error)) from None
    except RecursionError:
        raise _too_deep() from None
    except JsonError:
        raise
    except ValueError:  # By default, Python reads integers of up to 4300 digits.
        raise JsonLimitError("an integer has too many digits: make it text, in quotes") from None
    if decoded.count("[") + decoded.count("{") > MAX_DEPTH and _is_deep(value):
        raise _too_deep()
    return value


def _is_deep(value: Any) -> bool:
    """Return whether lists and objects are nested more than `MAX_DEPTH` levels deep, without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        children = (child for each in level for child in (each.values() if isinstance(each, dict) else each))
        level = [child for child in children if type(child) in (dict, list)]
        if not level:
            return False
    return True


def _too_deep() -> JsonLimitError:
    return JsonLimitError(f"lists and objects stand in each other more than {MAX_DEPTH} times")


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    [(name, count)] = Counter(name for name, _ in members).most_common(1) or [("", 0)]
    if count > 1:
        raise JsonError(f"the name {name!r:.80} is there {count} times")
    return dict(members)

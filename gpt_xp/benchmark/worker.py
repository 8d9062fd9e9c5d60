"""A contender's own process: it answers one line of JSON on stdin with one on stdout, and otherwise sleeps.

    {"do": "describe"}                            {"name", "version", "device", "dtype", "settings": {...}}
    {"do": "logits", "tokens": [...]}             {"logits": [n_vocab numbers]}, those after the last token, or null
    {"do": "run", "prompts": [[...]], "tokens": n}  {"seconds": [n numbers], "compile_seconds": number or null}
    {"do": "memory"}                              {"peak_memory_bytes": number or null}
    {"do": "quit"}                                the end, as is the end of stdin

Whatever goes wrong is answered by {"error": "in one line"}. A contender of another library is a script that ends in
`serve(lambda: TheirContender(...))`.
"""

import json
import os
from collections.abc import Callable
from typing import Any, Protocol, TextIO

import numpy as np

from gpt_xp import json_text
from gpt_xp.backend import peak_process_memory
from gpt_xp.errors import GptXpError


class Contender(Protocol):
    """Something that generates with one model.

    It may have two more methods: `peak_memory() -> int | None`, the most bytes that it has held (default: those of the
    process), and `compile_seconds() -> float`, what it has spent on compiling so far, all of which `run` includes.
    """

    def describe(self) -> dict[str, Any]:
        """Return `name`, `version`, `device` and `dtype` as strings, and `settings`, a dict of strings.

        A `dtype` that `tolerances.py` knows has its logits checked; others ("int8") have theirs reported.
        """

    def logits(self, tokens: list[int]) -> "np.ndarray[Any, Any] | None":
        """Return the logits [n_vocab] after the last of `tokens`; None from a contender that computes none."""

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Continue all prompts together, and return how long it took, in seconds.

        The first of the `n_tokens` numbers is prefill, from the call to the choice of the first token of every row;
        each other is one more token of every row. Choices are greedy, and an end token ends nothing. Prompts have one
        length, and what was computed for an earlier prompt must not be used again.
        """


def serve(make: Callable[[], Contender]) -> None:
    """Make the contender at the first request, and answer requests until "quit" or the end of stdin.

    What the libraries write to stdout, by whatever way, goes to stderr.
    """
    requests, answers = _take_streams()
    contender: Contender | None = None
    for line in requests:
        request = json_text.parse(line)
        if request["do"] == "quit":
            return
        try:
            contender = make() if contender is None else contender
            answer = _ANSWERS[request["do"]](contender, request)
        except Exception as error:  # the one place where a contender's failure becomes its reason
            answer = {"error": one_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def one_line(error: Exception) -> str:
    """Return what went wrong in one line: gpt-xp's own errors speak for themselves, others have their class named."""
    text = " ".join(str(error).split())
    return text if isinstance(error, GptXpError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _take_streams() -> tuple[TextIO, TextIO]:
    """Return stdin and stdout under numbers of their own, and leave nothing to read and stderr in their places."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def _logits(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    logits = contender.logits(request["tokens"])
    return {"logits": None if logits is None else np.asarray(logits, dtype=np.float64).tolist()}


def _run(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    compiled: Callable[[], float] | None = getattr(contender, "compile_seconds", None)
    before = compiled() if compiled else 0.0
    seconds = contender.run(request["prompts"], request["tokens"])
    return {"seconds": [float(each) for each in seconds], "compile_seconds": compiled() - before if compiled else None}


def _memory(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    peak: Callable[[], int | None] = getattr(contender, "peak_memory", peak_process_memory)
    return {"peak_memory_bytes": peak()}


_ANSWERS: dict[str, Callable[[Contender, dict[str, Any]], dict[str, Any]]] = {
    "describe": lambda contender, request: contender.describe(),
    "logits": _logits,
    "run": _run,
    "memory": _memory,
}

"""The process of a contender: it answers each line of JSON on stdin with one line on stdout, and sleeps in between.

    {"do": "describe"}                            {"name", "version", "device", "dtype", "settings": {...}}
    {"do": "logits", "tokens": [...]}             {"logits": [n_vocab numbers]}, those after the last token, or null
    {"do": "run", "prompts": [[...]], "tokens": n}  {"seconds": [n numbers], "compile_seconds": number or null,
                                                     "cores": number}
    {"do": "memory"}                              {"peak_memory_bytes": number or null}
    {"do": "quit"}                                no answer: the process ends, as it does at the end of stdin

The answer to a request that fails is {"error": "in one line"}. To measure another library, write a script that ends in
`serve(lambda: TheirContender(...))`.
"""

import json
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from gpt_xp import json_text
from gpt_xp.memory import peak_process_memory
from gpt_xp.processes import one_line, take_streams


class Contender(Protocol):
    """The interface of a contender, which generates with one model.

    It may have two more methods. `peak_memory() -> int | None` returns the largest number of bytes it has held
    (default: the peak memory of the process). `compile_seconds() -> float` returns the seconds that it has spent on
    compiling so far, which the times of `run` include.
    """

    def describe(self) -> dict[str, Any]:
        """Return `name`, `version`, `device` and `dtype` as strings, and `settings`, a dict of strings.

        Logits are checked for a `dtype` with a tolerance in `tolerances.py`. For others, such as "int8", their
        difference is only reported.
        """

    def logits(self, tokens: list[int]) -> "np.ndarray[Any, Any] | None":
        """Return the logits [n_vocab] after the last of `tokens`, or None where the contender computes none."""

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Continue all prompts together, and return `n_tokens` times in seconds.

        The first time is prefill, from the call to the choice of the first token of every row. Each other time is one
        more token of every row. Choices are greedy, and generation goes on after an end token. All prompts have one
        length. Results of an earlier call must not be used again.
        """


def serve(make: Callable[[], Contender]) -> None:
    """Make the contender at the first request, and answer requests until "quit" or the end of stdin.

    Everything that libraries write to stdout goes to stderr.
    """
    requests, answers = take_streams()
    contender: Contender | None = None
    for line in requests:
        request = json_text.parse(line)
        if request["do"] == "quit":
            return
        try:
            contender = make() if contender is None else contender
            answer = _ANSWERS[request["do"]](contender, request)
        except Exception as error:  # Any failure of a contender becomes its answer.
            answer = {"error": one_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _logits(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    logits = contender.logits(request["tokens"])
    return {"logits": None if logits is None else np.asarray(logits, dtype=np.float64).tolist()}


def _run(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    compiled: Callable[[], float] | None = getattr(contender, "compile_seconds", None)
    before, cpu, begin = compiled() if compiled else 0.0, time.process_time(), time.perf_counter()
    seconds = contender.run(request["prompts"], request["tokens"])
    cores = (time.process_time() - cpu) / (time.perf_counter() - begin)
    compile_seconds = compiled() - before if compiled else None
    return {"seconds": [float(each) for each in seconds], "compile_seconds": compile_seconds, "cores": cores}


def _memory(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    peak: Callable[[], int | None] = getattr(contender, "peak_memory", peak_process_memory)
    return {"peak_memory_bytes": peak()}


_ANSWERS: dict[str, Callable[[Contender, dict[str, Any]], dict[str, Any]]] = {
    "describe": lambda contender, request: contender.describe(),
    "logits": _logits,
    "run": _run,
    "memory": _memory,
}

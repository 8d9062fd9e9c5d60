"""A worker in a process: `python -m gpt_xp.jobs.worker_process`. The local engine starts it.

It reads lines of JSON on stdin: first the options of a worker, then {"shard": 12} for each shard. It answers on stdout:

    {"ready": true, "warnings": [...]}           the model is loaded
    {"prompts": 8, "bytes": 612}                 some prompts of the shard are done
    {"number": 12, "how": "computed", ...}       the shard is done: the fields of `ShardResult`
    {"error": "...", "kind": "PromptError"}      an error of gpt-xp; the process ends
    {"traceback": "..."}                         any other error; the process ends

The process ends at the end of stdin, also in the middle of a shard. So it never outlives the process that started it.
"""

import json
import os
import queue
import signal
import threading
import traceback
import warnings
from dataclasses import asdict
from typing import Any, TextIO

from gpt_xp import json_text
from gpt_xp.errors import GptXpError, GptXpWarning
from gpt_xp.jobs.worker import Worker, WorkerOptions
from gpt_xp.processes import take_streams


def main() -> None:
    """Load the model and compute shards until the end of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; its driver ends it.
    requests, answers = take_streams()
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(requests, lines), daemon=True).start()

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", GptXpWarning)
            worker = Worker(WorkerOptions(**json_text.parse(lines.get())))
        told = [str(each.message) for each in caught if issubclass(each.category, GptXpWarning)]
        answer(ready=True, warnings=told)
        while True:
            number = json_text.parse(lines.get())["shard"]
            answer(**asdict(worker.run(number, lambda prompts, n_bytes: answer(prompts=prompts, bytes=n_bytes))))
    except GptXpError as error:
        answer(error=str(error), kind=type(error).__name__)
    except BrokenPipeError:  # The driver is gone.
        pass
    except Exception:
        answer(traceback=traceback.format_exc())
    os._exit(1)


def _read(requests: TextIO, lines: "queue.Queue[str]") -> None:
    for line in requests:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()

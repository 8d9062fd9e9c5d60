"""A contender with invented times: python fake_contender.py BEHAVIOUR SCALE LOG.

Its run number k (from 1 on) reports k * SCALE seconds of prefill. The later tokens take 2, 3 and 7 thousandths of that
in turn. Each run writes a line to LOG.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from gpt_xp.benchmark.worker import serve

behaviour, scale, log = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
N_VOCAB = 97


class Fake:
    def __init__(self) -> None:
        self.runs = 0
        if behaviour == "missing":
            raise ModuleNotFoundError("No module named 'their_library'")

    def describe(self):
        known = {"name": "fake", "version": "1.0", "device": "cuda:0" if behaviour == "cuda" else "cpu"}
        dtype = {} if behaviour == "no dtype" else {"dtype": "int8" if behaviour == "int8" else "float32"}
        return {**known, **dtype, "settings": {"behaviour": behaviour}}

    def logits(self, tokens):
        logits = np.sin(np.arange(N_VOCAB) + sum(tokens))
        if behaviour in ("wrong", "int8"):
            logits[3] += 0.01
        return {"nan": np.where(logits > 0.5, np.nan, logits), "few": logits[1:], "floor": None}.get(behaviour, logits)

    def run(self, prompts, n_tokens):
        self.runs += 1
        with log.open("a") as lines:
            lines.write(json.dumps([sys.argv[1:3], prompts, n_tokens]) + "\n")
        if behaviour == "noise":
            print('{"seconds": "on stdout"}', flush=True)
            os.write(1, b'{"error": "by number"}\n')
            subprocess.run(["echo", '{"seconds": "of a child"}'], check=True)
        if self.runs == 4 and behaviour == "dies":
            os.write(2, b"some warning\ntheir_library: out of luck\n")
            os._exit(3)
        if self.runs == 4 and behaviour == "raises":
            raise ValueError("first line\nsecond line")
        seconds = [self.runs * scale * part for part in (1, *([2e-3, 3e-3, 7e-3] * n_tokens)[: n_tokens - 1])]
        return seconds[1:] if behaviour == "short" else seconds

    if behaviour == "slow to compile":

        def compile_seconds(self):
            return 10.0 * min(self.runs, 2)

        def peak_memory(self):
            return 12345


if behaviour == "noise":
    print("a banner", flush=True)
    print("{not JSON", flush=True)
if behaviour != "silent":
    serve(Fake)

"""Training and fine-tuning, on JAX: `gpt_xp.train`.

`settings.py` says what is asked for, `corpus.py` makes token ids of text, `program.py` is one step, `state.py` keeps a run
on disk, `start.py` makes what a run begins with, and `loop.py` goes from one step to the next.
"""

from gpt_xp.training.loop import Evaluation, Training, Watcher, train
from gpt_xp.training.settings import Settings

__all__ = ["Evaluation", "Settings", "Training", "Watcher", "train"]

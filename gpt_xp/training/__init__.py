"""Training and fine-tuning, on JAX: `gpt_xp.train`.

`settings.py` says what is asked for, `corpus.py` makes token ids of text, `program.py` is one step, `start.py` makes
what a run begins with, `state.py` keeps it on disk, `log.py` tells of it, and `loop.py` goes from one step to the next.
"""

from gpt_xp.training.log import Evaluation, Training, Watcher
from gpt_xp.training.loop import train
from gpt_xp.training.settings import Settings

__all__ = ["Evaluation", "Settings", "Training", "Watcher", "train"]

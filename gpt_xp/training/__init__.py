"""`gpt_xp.train`: train and fine-tune a model, on JAX.

- `settings.py` has the settings of a run, and `corpus.py` makes token ids of text.
- `program.py` computes one step, and `start.py` makes what a run begins with.
- `state.py` keeps a run on disk, and `log.py` records and reports its evaluations.
- `loop.py` has `gpt_xp.train`, which takes one step after the other.
"""

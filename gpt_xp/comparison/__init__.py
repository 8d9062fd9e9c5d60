"""`gpt-xp compare`: the same model on several array libraries, and by how much they differ.

`driver.py` starts a process for each backend, `worker.py` is what runs in it, `figures.py` compares what comes out,
and `report.py` and `plot.py` show it. The reference is the same `model.py` on NumPy in float64.
"""

from gpt_xp.comparison.driver import Comparison, Run, compare

__all__ = ["Comparison", "Run", "compare"]

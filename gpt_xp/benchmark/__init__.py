"""`gpt-xp bench`: how fast the same model is on several array libraries, and beside what the machine can do.

Each contender lives in a process of its own, and they take turns: A B A B. `worker.py` is what runs in such a process,
for anything that is a `worker.Contender`; `contenders.py` has gpt-xp's own and the floor; `driver.py` gives the turns,
and `figures.py` makes medians and ratios of them; `report.py` and `plot.py` show these. The scripts in `benchmarks/`
stand on the same, with contenders of their own.
"""

from gpt_xp.benchmark.driver import Benchmark, Entry, Standing, race
from gpt_xp.benchmark.figures import Workload
from gpt_xp.benchmark.models import bench, floor_entry, own_entry

__all__ = ["Benchmark", "Entry", "Standing", "Workload", "bench", "floor_entry", "own_entry", "race"]

"""`gpt-xp bench`: how fast one model is on several array libraries, compared with the limit of the machine.

Each contender has its own process, and they take turns: A B A B. Read the modules in this order:

- `worker.py` runs in the process of a contender, and `contenders.py` has gpt-xp's own contenders.
- `process.py` talks to such a process, and `contestant.py` keeps what one contender has done so far.
- `driver.py` gives the turns, `figures.py` makes medians and ratios of them, `results.py` holds the result.
- `report.py` and `plot.py` show the result, and `models.py` has `gpt_xp.bench`.

The scripts in `benchmarks/` use these modules with contenders of other libraries.
"""

"""`gpt-xp compare`: how far the results of several array libraries differ for one model.

`driver.py` has `gpt_xp.compare`, and starts a process for each backend. `worker.py` runs in such a process,
`figures.py` compares its arrays with the reference, and `results.py` holds the result. `report.py` and `plot.py` show
it. The reference is the same `transformer.py` on NumPy in float64.
"""

"""`gpt-xp conform`: check whether an array library that gpt-xp does not know can run GPT-2, and how exactly.

`run.py` has `conform`, which asks one check after the other of a process with the library (`process.py`, `worker.py`).
Before that, `inputs.py` checks the model and the timeout. `adapter.py` makes a backend of any namespace, and
`checks.py` has the checks. `functions.py` lists the functions of the standard that GPT-2 uses. `lines.py` finds the
line that fails. `results.py` holds the results, `report.py` shows them, and `plugin.py` gives them to pytest.
"""

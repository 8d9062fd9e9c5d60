"""The engines that gpt-xp is measured against, each behind the interface of `gpt_xp.benchmark`.

A module has `prepare(folder, dtype)`, which writes the files that the engine reads to the folder of the checkpoint
(some need none), and `Contender(folder, dtype, threads, device)` with `describe`, `logits` and `run`.
"""

"""The engines that gpt-xp is measured against, each behind the interface of `gpt_xp.benchmark`.

A module has `prepare(folder, dtype)`, which writes what the engine reads into the folder of the checkpoint (nothing,
for some), and `Contender(folder, dtype, threads, device)` with `describe`, `logits` and `run`.
"""

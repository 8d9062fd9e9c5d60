"""`gpt-xp bench`: how fast one model is on several array libraries."""

import json

import click


@click.command("bench-worker", hidden=True)
@click.argument("job")
def bench_worker(job: str) -> None:
    """Be one contender of a benchmark, which JOB describes in JSON: what `gpt_xp.bench` starts for each."""
    from gpt_xp.bench.contenders import make
    from gpt_xp.bench.worker import serve

    serve(lambda: make(json.loads(job)))

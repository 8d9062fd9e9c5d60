"""Write records to a file: JSON lines, or parquet with pyarrow."""

import importlib.util
import json
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol

from gpt_xp.errors import SettingError
from gpt_xp.installation import install_command
from gpt_xp.jobs.job import Job

Record = dict[str, Any]


class Writer(Protocol):
    """Writes records. As a context, it waits at the end until they are on the disk."""

    def write(self, records: Iterable[Record]) -> None:
        """Write the records of a window."""

    def __enter__(self) -> "Writer": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class JsonLines:
    """Writes a line of JSON for each record, in ASCII."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", encoding="ascii", newline="\n")  # noqa: SIM115, __exit__ closes it

    def write(self, records: Iterable[Record]) -> None:
        """Write the records of a window."""
        self._file.writelines(json.dumps(record) + "\n" for record in records)

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


class Parquet:
    """Writes a row for each record, and a group of rows for each window. All parts of a job have one schema."""

    def __init__(self, path: str, job: Job) -> None:
        import pyarrow
        import pyarrow.parquet

        self._pyarrow, self._path = pyarrow, path
        columns = _columns(job)
        types = {"text": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64(), "json": pyarrow.string()}
        types |= {"ints": pyarrow.list_(pyarrow.int32()), "floats": pyarrow.list_(pyarrow.float64())}
        self._json = [name for name, kind in columns.items() if kind == "json"]
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, records: Iterable[Record]) -> None:
        """Write the records of a window."""
        rows = [_utf8(record | {n: json.dumps(record[n]) for n in self._json if n in record}) for record in records]
        self._writer.write_table(self._pyarrow.Table.from_pylist(rows, schema=self._schema))

    def __enter__(self) -> "Parquet":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._writer.close()
        if kind is None:
            with open(self._path, "rb+") as file:
                os.fsync(file.fileno())


def open_writer(path: str, job: Job) -> Writer:
    """Return a writer of the job's format that writes to `path`."""
    return Parquet(path, job) if job.format == "parquet" else JsonLines(path)


def count_errors(path: str | os.PathLike[str], format: str) -> int:
    """Return the number of error records in a part."""
    if format == "parquet":
        import pyarrow.parquet

        types = pyarrow.parquet.read_table(path, columns=["type"]).column("type").to_pylist()
        return int(types.count("error"))
    with open(path, "rb") as file:
        return sum(line.startswith(b'{"type": "error"') for line in file)


def check_format(format: str) -> None:
    """Raise `SettingError` where a library for the format is missing."""
    if format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise SettingError(f"format parquet needs pyarrow, which is not installed: {install_command('parquet')}")


def _columns(job: Job) -> dict[str, str]:
    """Return the name and the kind of each column."""
    text = "text" if job.kind == "score" else "prompt"
    begin = {"type": "text", "file": "text", "offset": "int", text: "text", "input": "json"}
    logprobs = job.settings.get("logprobs")
    figures: dict[str, str] = {
        "generate": {"sample": "int", "text": "text", "token_ids": "ints"}
        | ({"logprobs": "floats"} if logprobs else {})
        | {"finish_reason": "text", "seed": "int"},
        "score": dict.fromkeys(("tokens", "scored_tokens", "words", "characters", "bytes"), "int")
        | dict.fromkeys(("logprob", "nats_per_token", "nats_per_character", "bits_per_byte"), "float")
        | dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity"), "float")
        | ({"per_token": "json"} if logprobs else {}),
        "choices": {"best": "int", "choices": "json"},
    }[job.kind]
    return begin | figures | {"error": "text"}


def _utf8(record: Record) -> Record:
    """Return the record with "?" for lone surrogates, which parquet cannot hold."""
    return {
        name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for name, value in record.items()
    }

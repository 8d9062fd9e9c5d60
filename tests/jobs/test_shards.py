"""Shards: whatever the bytes, each line is in exactly one of them."""

import gzip
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_xp.errors import PromptError, TextError
from gpt_xp.jobs import shards as module
from gpt_xp.jobs.inputs import find_inputs
from gpt_xp.jobs.job import Job
from gpt_xp.jobs.shards import Line, Shards, line_number, line_seed, raw_lines

LINES = st.lists(st.sampled_from([b"", b" ", b"a", b"\r", b"bc", b"\xff", b"long line", b"\xef\xbb\xbf"]))


def job_of(*files: Path, shard_bytes: int = 10, kind: str = "generate") -> Job:
    inputs = find_inputs(files, kind)
    return Job(kind, "m", "sha256:0", "float32", None, {}, "jsonl", shard_bytes, 1, inputs)


def all_lines(job: Job) -> Iterator[tuple[int, Line]]:
    shards = Shards(job)
    for number in range(len(shards)):
        for line in shards.lines(shards[number]):
            yield shards[number].file, line


@given(data=st.one_of(st.binary(), LINES.map(b"\n".join)), size=st.integers(1, 40), most=st.integers(1, 12))
def test_the_lines_of_all_shards_are_the_lines_of_the_file(data: bytes, size: int, most: int) -> None:
    expected, place = [], 0
    for line in data.split(b"\n"):
        text = line.removeprefix(b"\xef\xbb\xbf") if place == 0 else line
        if len(line) > most:
            expected.append((place, None))
        elif text.strip():
            expected.append((place, text.removesuffix(b"\r")))
        place += len(line) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_LINE_BYTES", most)
        found = [
            (offset, line)
            for begin in range(0, len(data), size)
            for offset, line, _ in raw_lines(io.BytesIO(data), begin, min(begin + size, len(data)))
        ]
        whole = [(offset, line) for offset, line, _ in raw_lines(io.BytesIO(data), 0, None)]
    assert found == expected
    assert whole == expected


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.integers(1, 60))
def test_shards_cover_each_file_and_numbers_go_on(sizes: list[int], shard_bytes: int) -> None:
    inputs = tuple(module.Input(f"{n}", f"{n}", size, 0, n == 2, False) for n, size in enumerate(sizes))
    shards = Shards(Job("generate", "m", "", "float32", None, {}, "jsonl", shard_bytes, 1, inputs))
    each = [shards[number] for number in range(len(shards))]
    assert [shard.number for shard in each] == list(range(len(each)))
    for file, size in enumerate(sizes):
        own = [shard for shard in each if shard.file == file]
        assert (own[0].begin, own[-1].end) == (0, size)
        assert all(a.end == b.begin for a, b in itertools.pairwise(own))
        assert len(own) == (1 if file == 2 else -(-size // shard_bytes))
    for number in (-1, len(shards)):
        with pytest.raises(IndexError):
            shards[number]


def test_a_gzip_file_is_one_shard_with_the_offsets_of_its_text(tmp_path: Path) -> None:
    text = b"".join(b'{"prompt": "line %d"}\n' % number for number in range(50))
    (tmp_path / "plain.jsonl").write_bytes(text)
    (tmp_path / "packed").write_bytes(gzip.compress(text))  # It is known by its first bytes, and not by its name.
    plain, packed = (job_of(tmp_path / name) for name in ("plain.jsonl", "packed"))
    assert len(Shards(plain)) > 50
    assert len(Shards(packed)) == 1
    pairs = [*zip(all_lines(plain), all_lines(packed), strict=True)]
    assert all((a.offset, a.content) == (b.offset, b.content) for (_, a), (_, b) in pairs)
    assert sum(line.n_bytes for _, (_, line) in pairs) <= packed.inputs[0].size  # Progress counts what is read.
    assert job_of(tmp_path / "packed").inputs[0].json


def test_a_damaged_gzip_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"".join(b"%x\n" % (number * 7919) for number in range(20_000)))[:-50])
    with pytest.raises(TextError, match=r"a\.gz cannot be read: Compressed file ended"):
        [*all_lines(job_of(path))]


def test_a_file_that_changes_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one\ntwo\n")
    job = job_of(path)
    path.write_text("one\ntwo\nthree\n")
    with pytest.raises(TextError, match=r"a has changed since the job began: put it back, or begin another job"):
        [*all_lines(job)]
    path.unlink()
    with pytest.raises(TextError, match="a cannot be read: No such file"):
        [*all_lines(job)]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (b"\n \n", "generate", "holds no prompt: expected one a line"),
        (b"", "generate", "holds no prompt: expected one a line"),
        (
            b'[\n{"prompt": "a"}\n]\n',
            "generate",
            'holds JSON that is not in lines: expected an object with a text "pro',
        ),
        (b'{\n"text": "a"\n}\n', "score", 'expected an object with a text "text" or "prompt" on each line'),
        (b"plain\n", "choices", 'holds no JSON lines: expected an object with "prompt" and "choices" on each line'),
        (b'{"prompt": "a", "max-tokens": 5}\n', "generate", 'the first line: "max-tokens" is the name of an option'),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: bytes, kind: str, message: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(text)
    with pytest.raises(PromptError) as caught:
        find_inputs([path], kind)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for file, message in (
        (tmp_path / "no", "No such file"),
        (tmp_path, "not a regular file"),
        ("-", "cannot read stdin"),
    ):
        with pytest.raises(TextError, match=message):
            find_inputs([file], "generate")


def test_the_seed_of_a_line_never_changes() -> None:
    """These values are in the records of users."""
    assert line_seed(0, 0, 0) == 1305254339056219
    assert line_seed(2**64 - 1, 3, 10**12) == 1180853186093869
    seeds = [line_seed(seed, file, offset) for seed in (1, 11) for file in (1, 11) for offset in range(1000)]
    assert len({*seeds}) == len(seeds)
    assert max(seeds) < 2**52
    assert max(seeds) > 2**51


def test_the_number_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one\n\ntwo\nthree")
    [source] = find_inputs([path], "generate")
    assert [line_number(source, offset) for offset in (0, 4, 5, 9)] == [1, 2, 3, 4]

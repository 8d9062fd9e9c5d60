"""`gpt-xp tokenizer`: train a tokenizer on text."""

import itertools
import os
from pathlib import Path

import click

from gpt_xp.cli.interrupts import ignore_interrupt
from gpt_xp.cli.options import CONTEXT, TEXT
from gpt_xp.cli.output import note, progress_bar
from gpt_xp.cli.prompts import sources
from gpt_xp.cli.wording import Command, Option
from gpt_xp.errors import CheckpointError
from gpt_xp.tokenizer.files import PAIRS, TOKENIZER_JSON
from gpt_xp.tokenizer.text_files import size_of, text_pieces
from gpt_xp.tokenizer.training import check_special_tokens, check_vocab_size, count_words, learn
from gpt_xp.tokenizer.words import EOS


@click.group(context_settings=CONTEXT)
def tokenizer() -> None:
    """Train a tokenizer on text."""


@tokenizer.command(cls=Command, context_settings=CONTEXT)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--vocab-size", cls=Option, metavar="N", type=int, required=True, help="Number of tokens, at least 257.")
@click.option(
    "--out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Directory for vocab.json and merges.txt.",
)  # fmt: skip
@click.option(
    "--special", metavar="TOKEN", multiple=True, type=TEXT,
    help=f"A special token beside {EOS}. May be given several times.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the tokenizer that is in DIR.")
def train(files: tuple[str, ...], vocab_size: int, out: Path, special: tuple[str, ...], force: bool) -> None:
    """Train a tokenizer (GPT-2's byte-level BPE) on the text of each FILE, or of stdin (-).

    The text is UTF-8. It is read once, in a stream, so it may be larger than memory.
    """
    special_tokens = check_special_tokens(dict.fromkeys([EOS, *special]))
    check_vocab_size(vocab_size, special_tokens)
    check_directory(out, force)
    texts = sources(files)
    with progress_bar(size_of(texts), "B") as bar:
        words = count_words(text_pieces(texts, advance=bar.update))
    with progress_bar(vocab_size - len(special_tokens) - 256, "token") as bar:
        learned = learn(words, vocab_size, special_tokens, advance=bar.update)
    n_characters = sum(len(word) * count for word, count in words.items())
    n_tokens = sum(len(learned.encode(word)) * count for word, count in words.items())
    with ignore_interrupt():  # Otherwise Ctrl-C could leave only one of the two files.
        learned.save(out)
    note(f"{vocab_size} tokens, in {out}; the text has {n_characters / n_tokens:.2f} characters per token")


def check_directory(out: Path, force: bool) -> None:
    """Raise `CheckpointError` where a tokenizer must not, or cannot, be written to `out`."""
    if (other := out / TOKENIZER_JSON).exists():
        raise CheckpointError(f"{other} would be read in place of a new tokenizer: remove it, or choose another --out")
    there = [name for name in itertools.chain(*PAIRS) if (out / name).exists()]
    if there and not force:
        raise CheckpointError(
            f"{out} has a tokenizer ({', '.join(there)}): choose another --out, or --force to replace it"
        )
    nearest = next(folder for folder in (out, *out.parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise CheckpointError(f"{out} cannot be written to: {nearest} is no directory that may be changed")

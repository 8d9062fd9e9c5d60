"""Learn byte-level BPE from text: the vocabulary and the merges of a `Tokenizer`.

Text is cut into words by `words.WORD`, and only the number of times that each word comes is kept. A word begins as
its bytes. Then, again and again, the most frequent pair of neighbours becomes a token, in every word. Pairs are counted
once. After that, a merge changes the counts of the pairs beside it, in the words that have it.

Sources: Sennrich et al. 2016, algorithm 1. Where that leaves a choice, the rules are those of `BpeTrainer` in Hugging
Face's `tokenizers`, so both learn the same. Of equally frequent pairs, the one with the smaller ids is first. The pair
of "aaa" counts twice. One occurrence is enough.
"""

import heapq
import numbers
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from gpt_xp.errors import SettingError, TokenizerError
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tokenizer.words import BYTE_OF_CHARACTER, CHARACTER_OF_BYTE, EOS, WORD, check_text

Pair = tuple[int, int]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Iterable[str] = (EOS,),
    *,
    advance: Callable[[int], object] | None = None,
) -> Tokenizer:
    """Return a tokenizer of `vocab_size` tokens: the special ones first, then the 256 bytes, then those of merges.

    Only the different words of `texts` are held in memory. No word reaches from one of `texts` into the next: cut a
    long one with `text_files.text_pieces`. Special tokens are plain text in `texts`, and no merge makes one. `advance`
    is called with 1 for each token that is learned.

    Raises `SettingError` for an impossible size or special token, before a text is read; `TokenizerError` for a value
    that is no text, and for texts that have too few pairs for so many tokens.
    """
    special = check_special_tokens(special_tokens)
    check_vocab_size(vocab_size, special)
    return learn(count_words(texts), vocab_size, special, advance=advance)


def check_special_tokens(special_tokens: Iterable[str]) -> list[str]:
    """Return the special tokens as a list. Raises `SettingError` unless all differ, and none is empty or a byte's."""
    if isinstance(special_tokens, str):
        raise SettingError(f"special_tokens is one str, expected a list: [{special_tokens!r}]")
    special = list(special_tokens)
    for place, token in enumerate(special):
        if not isinstance(token, str) or not token:
            raise SettingError(f"special token {token!r}: expected a str of one character or more")
        if token in special[:place]:
            raise SettingError(f"special token {token!r} is there twice: give each one once")
        if token in BYTE_OF_CHARACTER:
            raise SettingError(f"special token {token!r} is what stands for a byte: choose a longer one, as {EOS}")
        check_text(token)
    return special


def check_vocab_size(vocab_size: int, special_tokens: Collection[str]) -> None:
    """Raise `SettingError` unless `vocab_size` is an integer that has room for the bytes and the special tokens."""
    n_special = len(special_tokens)
    least = len(CHARACTER_OF_BYTE) + n_special
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, numbers.Integral):
        raise SettingError(f"vocab_size is {vocab_size!r}: expected an integer")
    if vocab_size < least:
        room = f"256 bytes and {n_special} special token{'s' * (n_special != 1)}"
        raise SettingError(f"vocab_size is {vocab_size}: expected at least {least}, for {room}")


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Count how often each word of `texts` comes. Raises `TokenizerError` for a value that is no text."""
    if isinstance(texts, str):
        raise TokenizerError("texts is one str, expected an iterable of them: put it in a list")
    words: Counter[str] = Counter()
    for text in texts:
        check_text(text)
        words.update(WORD.findall(text))
    return words


def learn(
    word_counts: Mapping[str, int],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    advance: Callable[[int], object] | None = None,
) -> Tokenizer:
    """Return the tokenizer of `train_tokenizer`, from counted words and checked settings."""
    tokens = [*special_tokens, *sorted(CHARACTER_OF_BYTE)]
    id_of_byte = [tokens.index(character) for character in CHARACTER_OF_BYTE]
    words = [[id_of_byte[byte] for byte in word.encode()] for word in word_counts]
    pairs = _Pairs(words, list(word_counts.values()))
    merges: list[tuple[str, str]] = []
    while len(tokens) < vocab_size:
        if (found := pairs.pop_most_frequent()) is None:
            raise TokenizerError(
                f"the text gives no more than {len(tokens)} tokens, with one for each of its words; {vocab_size} were "
                "asked for: choose a smaller vocabulary, or give more text"
            )
        pair, places = found
        left, right = (tokens[id] for id in pair)
        if left + right in special_tokens:
            continue
        pairs.merge(pair, places, new=len(tokens))
        tokens.append(left + right)
        merges.append((left, right))
        if advance is not None:
            advance(1)
    return Tokenizer({token: id for id, token in enumerate(tokens)}, merges, special_tokens)


class _Pairs:
    """The pairs of neighbours in all words: how often each comes, and in which words.

    The bytes of a token are merged in the same way wherever they are. So no token is made in two ways, and a merge
    brings only pairs that have the new token. Each pair appears once, in all its words, and then its count only falls.
    """

    def __init__(self, words: list[list[int]], word_counts: Sequence[int]) -> None:
        """Count the pairs of `words`, lists of token ids, which merges change. Word i comes `word_counts[i]` times."""
        self.words, self.word_counts = words, word_counts
        self.counts: defaultdict[Pair, int] = defaultdict(int)
        # A heap of (-count, pair, places of its words). The least is next, and its count is corrected when it is taken.
        self.heap: list[tuple[int, Pair, list[int]]] = []
        self._change((place, pair, 1) for place, word in enumerate(words) for pair in pairwise(word))

    def pop_most_frequent(self) -> tuple[Pair, list[int]] | None:
        """Return the next pair to merge, and the places in `words` that may have it; None if there is no pair."""
        while self.heap:
            old_count, pair, places = self.heap[0]
            count = -self.counts[pair]
            if count == old_count:
                heapq.heappop(self.heap)
                return pair, places
            if count:
                heapq.heapreplace(self.heap, (count, pair, places))
            else:
                heapq.heappop(self.heap)
        return None

    def merge(self, pair: Pair, places: list[int], new: int) -> None:
        """Replace `pair` by the token `new` in the words at `places`."""
        self._change((place, *change) for place in places for change in self._merge_word(place, pair, new))

    def _merge_word(self, place: int, pair: Pair, new: int) -> Iterator[tuple[Pair, int]]:
        """Merge in one word, from the left, and yield the pairs that go (-1) and come (1)."""
        left, right = pair
        word, merged, i = self.words[place], [], 0
        while i < len(word):
            if word[i] != left or i + 1 == len(word) or word[i + 1] != right:
                merged.append(word[i])
                i += 1
                continue
            if merged:
                yield (merged[-1], left), -1
                yield (merged[-1], new), 1
            merged.append(new)
            i += 2
            if i < len(word):
                yield (right, word[i]), -1
                yield (new, word[i]), 1
        self.words[place] = merged

    def _change(self, changes: Iterable[tuple[int, Pair, int]]) -> None:
        """Count pairs that come and go, each with the place of its word, and add those that come to the heap."""
        came: defaultdict[Pair, list[int]] = defaultdict(list)
        for place, pair, change in changes:
            self.counts[pair] += change * self.word_counts[place]
            if change > 0 and came[pair][-1:] != [place]:
                came[pair].append(place)
        for pair, places in came.items():
            if self.counts[pair]:
                heapq.heappush(self.heap, (-self.counts[pair], pair, places))

"""The records of a look inside the model. The page and the tables of the terminal show them."""

import html
from dataclasses import dataclass, field
from pathlib import Path

from gpt_xp.atomic_files import written_aside
from gpt_xp.comparison.distances import Distance
from gpt_xp.config import GPT2Config
from gpt_xp.types import NumpyArray

MAX_SIZE = 8 * 2**20  # A page has at most so many bytes, where no other number is given. `--max-size 8M` is the same.
TOP = 256  # So many logits are kept at each position.
BINS = 64  # The histogram of the other logits has so many bins.
LENS_TOP = 5  # A cell of the logit lens has so many tokens.


@dataclass(frozen=True, eq=False)
class Predictions:
    """The logits after each token.

    `ids` int32 and `logits` float32 [n_seq, TOP] are the largest, the largest first; with a smaller vocabulary they are
    all. The other logits of a position are counted in BINS bins: `counts` int32 [n_seq, BINS], and `levels` float32
    [n_seq, BINS], one number that stands for each logit of a bin. The sum of exp(logits) is exact with these numbers;
    at other temperatures it is an approximation. `all_logits` float32 [n_vocab] are those of `position`, all exact.
    """

    ids: NumpyArray
    logits: NumpyArray
    counts: NumpyArray
    levels: NumpyArray
    position: int
    all_logits: NumpyArray


@dataclass(frozen=True, eq=False)
class Lens:
    """The logit lens: `unembed(layer_norm(x, **ln_f))` of the residual stream before the first and after each block.

    The rows are the embedding and the `n_layer` blocks, the columns the positions from `first` on. `ids` int32 and
    `logprobs` float32 [n_layer + 1, n, LENS_TOP] are the likeliest tokens and their log-probabilities in nats. `final`
    float32 [n_layer + 1, n] is the log-probability of the token that the whole model finds likeliest.
    """

    first: int
    ids: NumpyArray
    logprobs: NumpyArray
    final: NumpyArray


@dataclass(frozen=True, eq=False)
class Attention:
    """The weights of attention.

    `kind` says what `weights` hold. "float32" and "uint8" are [n_layer, n_head, n_seq * (n_seq + 1) / 2]: the lower
    triangle, row by row. Bytes are 255 times the square root of the weight, rounded. "small" are pictures, bytes
    [n_layer, n_head, s, s] in the same scale: each number is the largest of a square of `square` x `square` weights.
    `last` [n_layer, n_head, n_seq] are the weights of the last token: float32, or where there are many, uint16, which
    are 65535 times the weight, rounded.
    """

    kind: str
    weights: NumpyArray
    last: NumpyArray
    square: int = 1


@dataclass(frozen=True, eq=False, repr=False)
class Look:
    """What happens inside the model for one prompt.

    `vocabulary` has the bytes of each token id that is mentioned anywhere in this record; it is empty for a model
    without a tokenizer. `surprise` float64 [n_seq] is -log p of each token in nats, NaN for the first, which nothing
    predicts. `distances` is empty unless backends were named. `left_out` are sentences that say what was too large.
    `made_by` are the versions and settings that made the numbers, by name.
    """

    model: str
    config: GPT2Config
    prompt: str | None
    token_ids: tuple[int, ...]
    vocabulary: dict[int, bytes]
    surprise: NumpyArray
    predictions: Predictions
    lens: Lens
    attention: Attention
    distances: tuple[Distance, ...] = ()
    left_out: tuple[str, ...] = ()
    made_by: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the model and the prompt, without the arrays."""
        prompt = "" if self.prompt is None else f", {self.prompt!r:.60}"
        return f"<Look: {self.model}, {len(self.token_ids)} tokens{prompt}>"

    def save(self, path: str | Path) -> None:
        """Write the page to one file, which any browser opens without a network.

        Raises `CheckpointError` where the file cannot be written.
        """
        content = self._page().encode()
        with written_aside(path, len(content)) as aside:
            Path(aside).write_bytes(content)

    def _repr_html_(self) -> str:
        """Return the page in a frame, for a notebook."""
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(self._page())}" title="gpt-xp look" '
            'style="width: 100%; height: 52rem; border: 0"></iframe>'
        )

    def _page(self) -> str:
        from gpt_xp.inspection.page import page  # It imports this module.

        return page(self)

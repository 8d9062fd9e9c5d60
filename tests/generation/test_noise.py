"""The noise of sampling, compared with an independent Philox and with the Gumbel distribution."""

import math

import numpy as np
import pytest

from gpt_xp.generation.noise import gumbel_noise

MASK = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute Philox 4x64 with 10 rounds in Python's integers, with the constants of the paper (Salmon et al. 2011)."""
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & MASK,
            (first >> 64) ^ counter[3] ^ key[1],
            first & MASK,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


def test_philox_is_the_published_one() -> None:
    # These are the known answers of the authors' library Random123.
    assert philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip


@pytest.mark.parametrize("key", [(0, 0, 0), (1, 2, 3), (2**64 - 1, 7, 1023)])
def test_noise_is_philox_turned_into_gumbel(key: tuple[int, int, int]) -> None:
    seed, sample, step = key
    words = [word for block in range(1, 4) for word in philox([block, step, 0, 0], [seed, sample])]
    bits = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)][:23]
    expected = [-math.log(-math.log1p(-(b + 0.5) / 2**32)) for b in bits]
    noise = gumbel_noise(seed, sample, step, 23)
    assert noise.dtype == np.float32
    np.testing.assert_array_equal(noise, np.array(expected).astype(np.float32))


def test_a_longer_vocabulary_begins_with_the_shorter() -> None:
    np.testing.assert_array_equal(gumbel_noise(1, 2, 3, 1000)[:17], gumbel_noise(1, 2, 3, 17))


def test_noise_of_some_tokens_is_that_of_all() -> None:
    n_vocab = 50257
    noise = gumbel_noise(1, 2, 3, n_vocab)
    for n_ids in (0, 1, 2, 7, 40, 1009):
        ids = np.random.RandomState(n_ids).choice(n_vocab, n_ids, replace=False)
        np.testing.assert_array_equal(gumbel_noise(1, 2, 3, n_vocab, ids), noise[ids])


def test_every_part_of_the_key_counts() -> None:
    draws = [gumbel_noise(*key, 101) for key in ((1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3))]
    assert len({draw.tobytes() for draw in draws}) == 5


def test_noise_has_the_gumbel_distribution() -> None:
    noise = np.sort(np.concatenate([gumbel_noise(5, 0, step, 50257) for step in range(4)]))
    assert abs(noise.mean() - 0.5772156649) < 0.01  # Euler's constant
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    # Kolmogorov-Smirnov test: the largest distance from exp(-exp(-x)) is below its 0.1% point.
    expected = np.exp(-np.exp(-noise.astype(np.float64)))
    distance = np.abs(expected - np.arange(1, noise.size + 1) / noise.size).max()
    assert distance < 1.95 / math.sqrt(noise.size)

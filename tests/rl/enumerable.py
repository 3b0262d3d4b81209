"""A policy whose completions can all be written down, in float64: a softmax over a table of logits
for each prefix.

Token 0 stops; a completion has at most LENGTH tokens. A prompt is a table of logits [P, V], one row
for each prefix that another token may follow.
"""

import itertools

import numpy as np
from scipy.special import log_softmax

VOCABULARY, LENGTH = 3, 3


def _sequences():
    for length in range(1, LENGTH + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if 0 not in tokens[:-1] and (tokens[-1] == 0 or length == LENGTH):
                yield tokens


SEQUENCES = tuple(_sequences())  # N of them
PREFIXES = {
    prefix: i for i, prefix in enumerate(sorted({y[:i] for y in SEQUENCES for i in range(len(y))}))
}
TOKENS = np.array([y + (0,) * (LENGTH - len(y)) for y in SEQUENCES])  # [N, LENGTH]
LENGTHS = np.array([len(y) for y in SEQUENCES])
MASK = np.arange(LENGTH) < LENGTHS[:, None]
ROWS = np.array([[PREFIXES[y[:i]] if i < len(y) else 0 for i in range(LENGTH)] for y in SEQUENCES])


def table(seed: int, scale: float = 1.0) -> np.ndarray:
    """Random logits [P, V]."""
    return scale * np.random.default_rng(seed).standard_normal((len(PREFIXES), VOCABULARY))


def token_log_probs(table: np.ndarray) -> np.ndarray:
    """[N, LENGTH], 0 behind the end."""
    return np.where(MASK, log_softmax(table, axis=-1)[ROWS, TOKENS], 0)


def probabilities(table: np.ndarray) -> np.ndarray:
    """[N], of whole completions."""
    return np.exp(token_log_probs(table).sum(-1))


def scores(table: np.ndarray) -> np.ndarray:
    """Gradients [N, P * V] of the completions' log-probabilities by the logits of the prompt."""
    found = np.zeros((len(SEQUENCES), *table.shape))
    softmax = np.exp(log_softmax(table, axis=-1))
    for n, i in zip(*np.nonzero(MASK), strict=True):
        found[n, ROWS[n, i]] += np.eye(VOCABULARY)[TOKENS[n, i]] - softmax[ROWS[n, i]]
    return found.reshape(len(SEQUENCES), -1)


def kl_gradient(sampled: np.ndarray, trained: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Gradient [P * V] of KL(p(. | sampled) || p(. | trained)) by the logits of `trained`, by
    central differences.
    """
    fixed = probabilities(sampled)

    def kl(logits):
        return np.sum(fixed * (np.log(fixed) - token_log_probs(logits).sum(-1)))

    moves = step * np.eye(trained.size).reshape(-1, *trained.shape)
    return np.array([kl(trained + move) - kl(trained - move) for move in moves]) / (2 * step)


def groups(size: int) -> np.ndarray:
    """All groups of `size` completions, as indices [N ** size, size]."""
    return np.array(list(itertools.product(range(len(SEQUENCES)), repeat=size)))


def expected_update(
    weights: np.ndarray, members: np.ndarray, sampled: np.ndarray, trained: np.ndarray
) -> np.ndarray:
    """E[sum over a group of weight * grad log p(y | trained)] [P * V] over all groups [N ** size,
    size] drawn from `sampled`.
    """
    of_group = probabilities(sampled)[members].prod(-1)
    return np.einsum("q,qg,qgd->d", of_group, weights, scores(trained)[members])

"""An interpolated character n-gram model (Witten and Bell 1991; Chen and Goodman 1998): a baseline.

    P(c | h) = (N(hc) + T(h) · P(c | h')) / (N(h) + T(h)),    P(c) below the unigrams = 1/V

N counts occurrences in the training text, N(h) = Σ_c N(hc); T(h) is the number of different characters that follow h;
h' is h without its first character. For a context that never occurs, P(c | h) = P(c | h').
"""

import dataclasses

import numpy as np

BLOCK = 2**22  # tokens that are counted at once: a signal is handled between two calls of NumPy


@dataclasses.dataclass(frozen=True)
class Order:
    """Counts of all k-grams hc: a context h of k-1 characters and a last character c.

    The code of a k-gram is (rank of h)·V + c; its rank is the index of its code, which keeps the codes small.
    """

    codes: np.ndarray  # int64 [n], sorted: one per k-gram that occurs
    counts: np.ndarray  # N(hc) [n]
    total: np.ndarray  # N(h) [contexts]
    types: np.ndarray  # T(h) [contexts]


class NGram:
    """An n-gram model of a text; `order` 4 predicts from the three preceding characters.

    ids: integers of any dtype in [0, n_vocab), [N]. Raises ValueError if the text is empty.
    """

    def __init__(self, ids: np.ndarray, n_vocab: int, order: int = 4):
        if not len(ids):
            raise ValueError("ids has 0 tokens; an n-gram model needs at least 1")
        self.n_vocab = n_vocab
        self.orders: list[Order] = []
        contexts, ranks = 1, np.zeros(len(ids), np.int64)  # rank of the k-1 characters before each one
        for k in range(min(order, len(ids))):
            codes, inverse, counts = counted(np.add(ranks * n_vocab, ids[k:], dtype=np.int64))
            context = codes // n_vocab
            total = np.bincount(context, weights=counts, minlength=contexts)
            self.orders.append(Order(codes, counts, total, np.bincount(context, minlength=contexts)))
            contexts, ranks = len(codes), inverse[:-1]

    def nats(self, ids: np.ndarray) -> np.ndarray:
        """Surprisal -log P of each character given the preceding ones, in nats: float64 [N]."""
        p = np.full(len(ids), 1 / self.n_vocab)
        ranks = np.zeros(len(ids), np.int64)  # -1: does not occur
        for k, order in enumerate(self.orders[: len(ids)]):
            codes = np.where(ranks < 0, -1, np.add(ranks * self.n_vocab, ids[k:], dtype=np.int64))
            found = [np.searchsorted(order.codes, codes[at : at + BLOCK]) for at in range(0, len(codes), BLOCK)]
            places = np.minimum(np.concatenate(found), len(order.codes) - 1)
            seen = order.codes[places] == codes
            count = np.where(seen, order.counts[places], 0)
            total, types = (np.where(ranks < 0, 0, table[ranks]) for table in (order.total, order.types))
            known = total > 0
            p[k:] = np.where(known, (count + types * p[k:]) / np.where(known, total + types, 1), p[k:])
            ranks = np.where(seen, places, -1)[:-1]
        return -np.log(p)


def counted(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different codes in order, the index of each code among them, and their counts, as `np.unique` returns them."""
    blocks = [codes[at : at + BLOCK] for at in range(0, len(codes), BLOCK)]
    parts = [np.unique(block, return_inverse=True, return_counts=True) for block in blocks]
    found = np.unique(np.concatenate([own for own, _, _ in parts]))
    counts, inverse = np.zeros(len(found), np.int64), []
    for own, places, numbers in parts:
        ranks = np.searchsorted(found, own)
        counts[ranks] += numbers
        inverse.append(ranks[places])
    return found, np.concatenate(inverse), counts

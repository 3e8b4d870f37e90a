"""The slow, literal model that an index is compared with: decoded vectors in a dictionary, searched exactly."""

import numpy as np

from mlx_turboquant.index import TurboQuantIndex
from mlx_turboquant.ops import trellis

WIDTHS = [1, 2, 2.5, 3, 3.5, 4, 8]
METRICS = ["ip", "cosine", "l2"]


def filled(x, *args, **kw):
    """An index with vectors."""
    index = TurboQuantIndex(x.shape[1], *args, **kw)
    index.add(x)
    return index


def estimates(index, q):
    """Estimated inner products (m, n) in the order of insertion."""
    D, I = index.search(q, index.ntotal)
    return np.take_along_axis(D, np.argsort(I, axis=1), axis=1)


def nearest_path(x):
    """The values (dim,) of the trellis path nearest to x (dim,), a state at a time: Viterbi, literally."""
    best = {0: (0.0, [])}  # by state, the last three codes: squared error, values
    for number in x:
        after = {}
        for state, (error, values) in best.items():
            for code in range(4):
                value = float(trellis.values()[state + 64 * code])
                path = (error + (number - value) ** 2, [*values, value])
                after[state // 4 + 16 * code] = min(path, after.get(state // 4 + 16 * code, (np.inf, [])))
        best = after
    return np.array(min(best.values())[1])


class IndexModel:
    """Ids and decoded vectors of an index in the order of insertion; products are float64."""

    def __init__(self, index):
        self.index, self.rows, self.next_id = index, {}, 0

    def add(self, x, ids=None):
        """Add to both; the model takes the decoded vectors from the index."""
        self.index.add(x, ids)
        ids = range(self.next_id, self.next_id + len(x)) if ids is None else ids
        ids = [int(each) for each in ids]
        norms = np.linalg.norm(x.astype(np.float64), axis=1)
        for each, decoded, norm in zip(ids, self.index.reconstruct(ids), norms, strict=True):
            self.rows[each] = (decoded.astype(np.float64), norm)
            self.next_id = max(self.next_id, each + 1)

    def remove(self, ids):
        """Remove from both."""
        assert self.index.remove_ids(ids) == len(ids)
        for each in ids:
            del self.rows[int(each)]

    def scores(self, q):
        """(m, n) float64, larger is better, in the unit of `search`'s D."""
        q = q.astype(np.float64)
        if self.index.metric == "cosine":
            q = q / np.maximum(np.linalg.norm(q, axis=1, keepdims=True), 1e-300)
        decoded = np.array([row for row, _ in self.rows.values()]).reshape(-1, self.index.d)
        products = q @ decoded.T
        if self.index.metric == "l2":
            squares = np.array([norm for _, norm in self.rows.values()]) ** 2
            return -np.maximum(np.square(q).sum(axis=1)[:, None] + squares - 2 * products, 0)
        return products

    def check(self, q, k, chosen=None):
        """Search both and compare: same scores to float32's rounding, and ids that have those scores."""
        D, I = self.index.search(q, k, filter=chosen)
        assert D.shape == I.shape == (len(q), k) and D.dtype == np.float32 and I.dtype == np.int64
        ids, scores = np.array([*self.rows], np.int64), self.scores(q)
        np.testing.assert_array_equal(self.index.ids, ids)
        if chosen is not None:
            chosen = np.asarray(chosen)
            kept = chosen if chosen.dtype == bool else np.isin(ids, chosen)
            ids, scores = ids[kept], scores[:, kept]
        found = min(k, len(ids))
        worst = np.inf if self.index.metric == "l2" else -np.inf
        assert (I[:, found:] == -1).all() and (D[:, found:] == worst).all()
        if not found:
            return
        goodness = -D[:, :found] if self.index.metric == "l2" else D[:, :found]
        assert (np.diff(goodness, axis=1) <= 0).all()
        tolerance = 1e-5 * (1 + np.abs(scores).max())
        np.testing.assert_allclose(goodness, -np.sort(-scores, axis=1)[:, :found], atol=tolerance)
        for row in range(len(q)):
            assert len(set(I[row, :found])) == found
            places = [int(np.flatnonzero(ids == each)[0]) for each in I[row, :found]]
            np.testing.assert_allclose(goodness[row], scores[row, places], atol=tolerance)

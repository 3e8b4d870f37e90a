"""The nearest path of each row through the trellis of the 2-bit code, in numpy."""

import numpy as np

# States times elements times rows at a time, one byte each: back pointers of all steps are held.
_BACK_BYTES = 1 << 25
# Rows at a time: with 512 a step's arrays, 512 KiB each, stay in a core's cache and numpy's calls do not count.
_ROWS = 512
_NEVER = 1e30


def windows(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The windows of the path whose values are nearest to each row.

    State t is the codes of the last three elements, two bits each, the oldest in the lowest bits; a row starts in state
    0. Window w = 4 t + j adds the code j before those three and names the element's value. States 4 m + j can go to
    the states 16 h + m, so a step's costs are an array (j, h, m, row) whose least over j are the new costs (h, m, row).

    Args:
        rows: (n, dim) float32.
        values: (256,) float32 by window.

    Returns:
        (n, dim) uint8. An element's code is its window's two highest bits. Of paths that are equally near, the one
        whose states are smaller, the last element first.

    Source: A. Viterbi (1967); M. Marcellin and T. Fischer, "Trellis coded quantization of memoryless and Gauss-Markov
        sources" (IEEE Trans. Commun. 1990), who quantize with it.
    """
    n, dim = rows.shape
    out = np.empty((n, dim), np.uint8)
    step = int(np.clip(_BACK_BYTES // (64 * dim), 16, _ROWS))
    for start in range(0, n, step):
        out[start : start + step] = _windows(rows[start : start + step], values)
    return out


def _windows(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    n, dim = rows.shape
    # (x - v)^2 for all values v at once is a product of matrices, [v^2, -2 v, 1] by [1, x, x^2].
    v = values.reshape(4, 16, 4).transpose(2, 0, 1).reshape(256)
    left = np.stack([v * v, -2 * v, np.ones_like(v)], axis=1)
    right = np.empty((dim, 3, n), np.float32)
    right[:, 0], right[:, 1] = 1, rows.T
    np.square(right[:, 1], out=right[:, 2])
    costs = np.full((64, n), _NEVER, np.float32)
    costs[0] = 0
    back = np.empty((dim, 4, 16, n), np.uint8)
    tried, before = np.empty((4, 4, 16, n), np.float32), np.empty((4, 1, 16, n), np.float32)
    pair, odd = np.empty((2, 4, 16, n), np.float32), np.empty((2, 4, 16, n), bool)
    high = np.empty((4, 16, n), bool)
    low, high_bit = odd.view(np.uint8), high.view(np.uint8)
    for i in range(dim):
        np.matmul(left, right[i], out=tried.reshape(256, n))
        before[:, 0] = costs.reshape(16, 4, n).transpose(1, 0, 2)
        np.add(tried, before, out=tried)
        np.less(tried[1::2], tried[::2], out=odd)
        np.minimum(tried[::2], tried[1::2], out=pair)
        np.less(pair[1], pair[0], out=high)
        np.minimum(pair[0], pair[1], out=costs.reshape(4, 16, n))
        # j = 2 + low[1] if high, else low[0]
        low[1] ^= low[0]
        low[1] &= high_bit
        low[0] ^= low[1]
        high_bit <<= 1
        np.bitwise_or(low[0], high_bit, out=back[i])
    state, row = costs.argmin(axis=0), np.arange(n)
    found = np.empty((dim, n), np.uint8)
    for i in range(dim - 1, -1, -1):
        window = 4 * state + back[i].reshape(-1).take(state * n + row)
        found[i], state = window, window & 63
    return found.T

"""The rows of an index: any sequence of calls against a model, ids against a dictionary, memory, the best keys."""

import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_model import METRICS, IndexModel, filled
from unit_vectors import units

from mlx_turboquant.index import TurboQuantIndex, blocks, ids, top


class Machine:
    """A sequence of calls on an index and its model."""

    def __init__(self, data, folder):
        self.data, self.folder = data, folder
        bits, metric = data.draw(st.sampled_from([1, 2.5, 4])), data.draw(st.sampled_from(METRICS))
        self.model = IndexModel(TurboQuantIndex(9, bits, metric, seed=data.draw(st.integers(0, 3))))

    def add(self):
        n = self.data.draw(st.integers(0, 25))
        x = np.random.default_rng(self.data.draw(st.integers(0, 1000))).standard_normal((n, 9)).astype(np.float32)
        x[: self.data.draw(st.integers(0, 2))] = 0
        asked = None
        if self.data.draw(st.booleans()):
            free = [each for each in range(120) if each not in self.model.rows]
            asked = self.data.draw(st.permutations(free))[:n]
            x = x[: len(asked)]
        self.model.add(x, asked)

    def remove(self):
        held = [*self.model.rows]
        count = self.data.draw(st.integers(0, len(held)))
        self.model.remove(self.data.draw(st.permutations(held))[:count])

    def save_and_load(self):
        path, old = self.folder / "index.tqi", self.model.index
        old.save(path)
        new = TurboQuantIndex.load(path, memory_map=self.data.draw(st.booleans()))
        q = units(4, 9, seed=7)
        for left, right in zip(old.search(q, 30), new.search(q, 30), strict=True):
            np.testing.assert_array_equal(left, right)
        np.testing.assert_array_equal(old.reconstruct(old.ids), new.reconstruct(new.ids))
        self.model.index = new

    def search(self):
        self.model.check(2 * units(3, 9, seed=5), self.data.draw(st.integers(1, 40)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sequence_of_calls_equals_the_model(data):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(blocks, "BLOCK_CODES", data.draw(st.sampled_from([9, 63, 1 << 20])))
        machine = Machine(data, Path(folder))
        for name in data.draw(
            st.lists(st.sampled_from(["add", "add", "remove", "save_and_load", "search"]), max_size=10)
        ):
            getattr(machine, name)()
        machine.search()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ids_are_found_as_in_a_dictionary(data):
    living, at, row = [], {}, 0
    found = ids.RowsOfIds(lambda rows: np.array(living, bool)[rows])
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            first = data.draw(st.integers(0, 40))
            new = [each for each in range(first, first + 8) if each not in at]
        else:
            new = data.draw(st.lists(st.integers(0, 60).filter(lambda each: each not in at), max_size=8, unique=True))
        living += [True] * len(new)
        if new:
            found.add(np.array(new), row)
        at.update({each: row + i for i, each in enumerate(new)})
        row += len(new)
        for each in data.draw(st.lists(st.sampled_from([*at]), unique=True)) if at else []:
            living[at.pop(each)] = False
        np.testing.assert_array_equal(found.find(np.arange(70)), [at.get(each, -1) for each in range(70)])


def test_default_ids_count_on_from_the_largest_ever():
    index = TurboQuantIndex(8)
    index.add(units(3, 8))
    index.add(units(2, 8), ids=[10, 7])
    index.add(units(1, 8))
    assert index.ids.tolist() == [0, 1, 2, 10, 7, 11]
    index.remove_ids([11, 10])
    index.add(units(1, 8))
    assert index.ids.tolist() == [0, 1, 2, 7, 12]
    index.add(units(1, 8), ids=[(1 << 63) - 1])
    with pytest.raises(ValueError, match=r"wanted ids up to 2\*\*63 - 1, got 1 vectors .* Give ids"):
        index.add(units(1, 8))
    index.add(units(1, 8), ids=[11])
    assert index.ntotal == 7 and index.search(units(1, 8), 7)[1].max() == (1 << 63) - 1


def test_growth_and_removal_copy_each_row_a_bounded_number_of_times(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CODES", 256 * 8)
    copied = []
    real = blocks.Block.append
    monkeypatch.setattr(
        blocks.Block, "append", lambda self, arrays: (copied.append(len(arrays["ids"])), real(self, arrays))[1]
    )
    index, x, buffers = TurboQuantIndex(8, 2), units(1000, 8), set()
    for start in range(0, 1000, 4):
        index.add(x[start : start + 4])
        buffers |= {id(block._arrays["ids"]) for _, block in index._blocks}
    assert sum(copied) == 1000 and len(buffers) <= 4 * (1 + 7)  # four blocks, each doubles from 4 to 256
    copied.clear()
    for each in np.random.default_rng(0).permutation(1000)[:990]:
        index.remove_ids([each])
    assert sum(copied) <= 990 and index.ntotal == 10 and index._blocks.total <= 20
    assert index.search(x, 3)[1].min() >= 0


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_a_refused_add_leaves_the_index_as_it_was(fail_at, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CODES", 100 * 16)
    monkeypatch.setattr("mlx_turboquant.vectors.rows.CHUNK_ELEMENTS", 120 * 16)
    x, q = units(360, 16), units(4, 16, seed=1)
    index = filled(x[:150], 3, "l2", keep="int8")
    before = index.search(q, 20, rerank=30)
    bad = x.copy()
    bad[120 * fail_at + 5, 3] = np.nan
    with pytest.raises(ValueError, match=rf"got NaN.* \({120 * fail_at + 5}, 3\)"):
        index.add(bad)
    assert index.ntotal == 150 and index.ids.tolist() == [*range(150)]
    for left, right in zip(index.search(q, 20, rerank=30), before, strict=True):
        np.testing.assert_array_equal(left, right)
    index.add(x)
    assert index.ids.tolist() == [*range(510)]
    again = filled(np.concatenate([x[:150], x]), 3, "l2", keep="int8")
    for left, right in zip(index.search(q, 40), again.search(q, 40), strict=True):
        np.testing.assert_array_equal(left, right)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_keys_are_those_of_a_stable_sort(data):
    m, n, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 700)), data.draw(st.integers(1, 30))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    scores = rng.standard_normal((m, n)) if data.draw(st.booleans()) else rng.integers(-2, 3, (m, n)) * -1.0
    scores[:, rng.random(n) < data.draw(st.sampled_from([0, 0.5, 0.99]))] = -np.inf
    scores = (scores * data.draw(st.sampled_from([1, 1e-42, 1e37]))).astype(np.float32)
    rows = np.sort(rng.choice(top.MAX_ROWS, n, replace=False))
    best = top.no_keys(m, k)
    for part in np.array_split(np.arange(n), data.draw(st.integers(1, 4))):
        if len(part):
            best = top.best_keys(best, mx.array(scores[:, part]), mx.array(rows[part]))
    D, found = top.sorted_keys(best)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    wanted = np.take_along_axis(scores, order, axis=1)
    kept = order.shape[1]
    np.testing.assert_array_equal(D[:, :kept], wanted)
    np.testing.assert_array_equal(found[:, :kept], np.where(wanted == -np.inf, -1, rows[order]))
    assert (found[:, kept:] == -1).all() and (D[:, kept:] == -np.inf).all()

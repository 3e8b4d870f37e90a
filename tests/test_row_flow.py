"""Keys and values followed through source: what may be done with them, and what is found to need arrays."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_turboquant.layers import attention_modules, why_not
from mlx_turboquant.row_flow import Flow
from mlx_turboquant.row_values import RowsReadError


class Attention(nn.Module):
    """Fetches keys and values, or is handed them, and hands them on."""

    def __call__(self, x, cache=None, shared=None):
        if shared is not None:
            keys, values = shared
        else:
            keys, values = x * 2, x * 3
            keys, values = cache.update_and_fetch(keys, values)
        assert keys.shape[1] == x.shape[1]
        return scaled_dot_product_attention(x, keys, values, cache=cache, scale=1.0, mask=None), (keys, values)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = Attention(), nn.LayerNorm(4)
        self.layers = [Attention(), Attention()]


class Shares(Stack):
    def __call__(self, x, cache):
        x, kept = self.first(x, cache[0])
        held = [(None, None)] * len(self.layers)
        for i, layer in enumerate(self.layers):
            (x, kept), here = layer(self.norm(x), shared=kept), i
            held[here] = (kept, i)
            kept, _ = held[i - 1]
        return self.norm(x)


class SharesInALoopThatAppends(Stack):
    def __call__(self, x, cache):
        pairs = []
        for layer, c in zip(self.layers, cache, strict=True):
            x, kept = layer(x, c)
            pairs.append(kept)
        for layer, (keys, values) in zip(self.layers, pairs, strict=True):
            x = self.attend(layer, x, keys, values) if keys is not None else x
        return x

    def attend(self, layer, x, keys, values):
        return layer(x, shared=(keys, values))[0]


class ReadsInTheModel(Stack):
    def __call__(self, x, cache):
        x, (keys, _) = self.first(x, cache[0])
        return x + keys.mean()


class ReadsAfterOneTurn(Stack):
    def __call__(self, x, cache):
        last = old = None
        for layer in self.layers:
            x = x if old is None else x + old
            old = last
            x, (last, _) = layer(x, cache[0])
        return x


class KeepsOnItself(Stack):
    def __call__(self, x, cache):
        x, self.kept = self.first(x, cache[0])
        return x


class GivesToMLX(Stack):
    def __call__(self, x, cache):
        x, (keys, _) = self.first(x, cache[0])
        return self.norm(keys)


class GivesToAFunction(Stack):
    def __call__(self, x, cache):
        return mx.concatenate([self.first(x, c)[1][0] for c in cache])


class GivesTheLayerToAFunction(Stack):
    def __call__(self, x, cache):
        return mx.checkpoint(self.first)(x, cache[0])


class ReadsWhatIsNestedDeeperEachTurn(Stack):
    def __call__(self, x, cache):
        x, kept = self.first(x, cache[0])
        while x.max() > 0:
            kept = (kept, x)
        return x + kept


class HandsOut(Stack):
    def __call__(self, x, cache):
        return self.first(x, cache[0])


@pytest.mark.parametrize("kind", [Shares, SharesInALoopThatAppends])
def test_rows_that_only_reach_the_attention_function_are_followed_there(kind):
    flow = Flow(kind())
    assert flow.call(kind, "__call__", [], {}) is None
    assert flow.fetched == flow.attended == {Attention}
    modules, reason = attention_modules(kind())
    assert [m.__name__ for m in modules] == [__name__] and reason is None


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        (ReadsInTheModel, "return x + keys.mean()"),
        (ReadsAfterOneTurn, "x = x if old is None else x + old"),
        (KeepsOnItself, "x, self.kept = self.first(x, cache[0])"),
        (GivesToMLX, "return self.norm(keys)"),
        (GivesToAFunction, "return mx.concatenate([self.first(x, c)[1][0] for c in cache])"),
        (GivesTheLayerToAFunction, "return mx.checkpoint(self.first)(x, cache[0])"),
        (ReadsWhatIsNestedDeeperEachTurn, "return x + kept"),
    ],
)
def test_the_first_other_use_is_named_with_its_class(kind, use):
    with pytest.raises(RowsReadError) as found:
        Flow(kind()).call(kind, "__call__", [], {})
    assert (found.value.kind, found.value.use) == (kind, use)
    modules, reason = attention_modules(kind().first, kind())
    assert modules == []
    name = __name__.rpartition(".")[2]
    assert reason == f"{name}.Attention hands its keys and values on, and {name}.{kind.__name__} reads them in '{use}'"


def test_rows_that_leave_the_model_keep_it_raw():
    reason = why_not(Attention)
    assert reason.endswith("Attention hands its keys and values to its caller")
    assert attention_modules(HandsOut()) == ([], reason)
    assert attention_modules(Attention()) == ([], reason)

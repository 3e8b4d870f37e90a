"""What the server reserves for requests: never less than a batch holds, from the model's shapes alone."""

import copy
import random

import mlx.core as mx
import pytest
from conftest import tiny_llama, tokens
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from mlx_turboquant import KVScheme, make_prompt_cache
from mlx_turboquant.cli.server_caches import Active, PromptCaches, SchemeBatchGenerator
from mlx_turboquant.cli.server_limit import KVBudget
from mlx_turboquant.cli.server_needs import KVNeeds, Need, used_layers
from mlx_turboquant.sizes import cache_nbytes, layer_shapes


def needs(model, scheme="turbo4", step=2048, at_once=8):
    return KVNeeds(used_layers(model, make_prompt_cache(model, kv_scheme=scheme)), step, at_once)


def test_a_request_alone_needs_its_compressed_rows_and_while_it_reads_its_raw_prompt(model):
    scheme, shapes = KVScheme.parse("turbo4"), layer_shapes(model)
    kept = sum(cache_nbytes(scheme, shape, 3100 + 3 * scheme.block) for shape in shapes)
    # Two layers, two key heads of 64, float32, keys and values; and the sums of the prompt's queries.
    raw = 2 * (3072 * 2 * 128 * 4 + 2 * 64 * 4)
    need = Need(3000, 3100)
    assert needs(model).nbytes([need], [need]) == kept + raw
    assert needs(model).nbytes([need], []) == kept
    assert needs(model).nbytes([], []) == 0
    assert needs(model, "turbo4:prefill=compressed", step=128).nbytes([need], [need]) < kept + raw / 2


def test_every_sequence_of_a_batch_needs_the_room_of_the_longest(model):
    bound = needs(model, step=512, at_once=2)
    long, short = Need(1000, 1500), Need(40, 50)
    one = bound.nbytes([long], [])
    assert bound.nbytes([long, short, short], []) == 3 * one
    reading = bound.nbytes([long, short, short], [short, short]) - 3 * one
    assert reading == 2 * 2 * (256 * 2 * 128 * 4 + 2 * 64 * 4)  # 40 rows and 40 of padding, in steps of 256
    assert bound.nbytes([long, short, short], [short] * 3) - 3 * one == reading  # only two are read at a time


@pytest.mark.parametrize("scheme", ["turbo4", "turbo2v8:block=32,window=8", "turbo3:prefill=compressed", "fp16"])
def test_no_batch_ever_holds_more_than_was_reserved_for_it(scheme):
    """Random schedules of joining and leaving; a part of the prompts begins with a stored conversation."""
    model, chance = tiny_llama(), random.Random(scheme)
    budget = KVBudget(1 << 62)
    budget.needs = needs(model, scheme, step=96, at_once=3)
    caches = PromptCaches(scheme, None)
    sizes = {"completion_batch_size": 6, "prefill_batch_size": 3, "prefill_step_size": 96}
    batch = SchemeBatchGenerator(caches, Active(), budget, model, **sizes)
    stored = caches.make(model)
    model(tokens(150, 5), cache=stored)
    for layer in stored:
        if hasattr(layer, "compress"):
            layer.compress()
    mx.eval([layer.state for layer in stored])
    running, closest = [], 0.0
    for step in range(80):
        if step < 60 and len(running) < 8 and chance.random() < 0.25:
            count, more = chance.choice([3, 60, 90, 300, 500]), chance.choice([1, 20, 90])
            prefix = chance.random() < 0.4 and count > 160
            segments = [tokens(count, step)[0].tolist()]
            if prefix:
                segments = [segments[0][150:]]
            elif count > 50:
                segments = [segments[0][:40], segments[0][40:]]
            budget.next = Need(count, count + more)
            given = [copy.deepcopy(stored)] if prefix else None
            running += batch.insert_segments([segments], [more], given, all_tokens=[[]])
        elif running and chance.random() < 0.05:
            batch.remove([running.pop(chance.randrange(len(running)))])
        _, generated = batch.next()
        running = [uid for uid in running if uid not in {r.uid for r in generated if r.finish_reason}]
        held = batch.prompt_cache_nbytes
        assert held <= budget.reserved() or held == 0, step
        closest = max(closest, held / max(budget.reserved(), 1))
    assert closest > 0.5  # the bound is no fantasy either
    batch.remove(running)
    assert budget.reserved() == 0 and budget.left() == 1 << 62


def test_a_prompt_that_joins_gives_no_other_sequence_its_raw_room(model):
    batch = SchemeBatchGenerator(PromptCaches("turbo4", None), Active(), None, model)
    batch.insert_segments([[tokens(100 + i, i)[0].tolist()] for i in range(6)], [200] * 6)
    for _ in range(10):
        batch.next()
    few = batch.prompt_cache_nbytes
    batch.insert_segments([[tokens(700, 9)[0].tolist()]], [200])
    most = 0
    for _ in range(5):
        batch.next()
        most = max(most, batch.prompt_cache_nbytes)
    raw = 2 * 768 * 2 * 128 * 4
    assert raw < most < few + 1.5 * raw  # and not 7 times the raw prompt
    batch.close()


def test_layers_of_every_kind_are_counted_and_unknown_ones_refused():
    def held(layer, count):
        rows = mx.zeros((1, 2, count, 16))
        layer.update_and_fetch(rows, rows)
        return layer

    row = 2 * 2 * 16 * 4
    plain, window = held(KVCache(), 1), held(RotatingKVCache(max_size=64), 1)
    both = CacheList(plain, window)
    bound = KVNeeds([both], 2048, 8)
    assert bound.nbytes([Need(10, 1000)], []) == (1280 + 512) * row
    assert held(KVCache(), 1000).nbytes == 1024 * row
    with pytest.raises(ValueError, match=r"\[--kv-memory-limit\] wanted layers .* got a object"):
        KVNeeds([object()], 2048, 8)

"""Which attention layers of mlx-lm can read compressed rows, decided from their source, and what the reasons say."""

import importlib

import mlx.nn as nn
import pytest
from mlx_lm.models import deepseek_v32, gemma4_text, iquestloopcoder, llama

from mlx_turboquant import hook, make_prompt_cache, unhook
from mlx_turboquant.binding import is_bound
from mlx_turboquant.layers import attention_modules, attention_of_layers, why_not


def model_class(path):
    """The class that 'llama.Attention' names in mlx_lm.models."""
    module, _, name = path.partition(".")
    return getattr(importlib.import_module(f"mlx_lm.models.{module}"), name)


@pytest.mark.parametrize(
    "path",
    [
        "llama.Attention",
        "qwen2.Attention",
        "qwen3.Attention",
        "gemma3_text.Attention",
        "gpt_oss.AttentionBlock",
        "phi3.Attention",
        "mixtral.MixtralAttention",
        "cohere2.Attention",
    ],
)
def test_attention_that_only_calls_the_attention_function_can_read_compressed_rows(path):
    assert why_not(model_class(path)) is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("deepseek_v3.DeepseekV3Attention", "also reads its keys or values in 'pe_scores = q_pe * self.scale @ k_pe."),
        ("deepseek_v32.Indexer", "reads 'cache.values' itself"),
        ("deepseek_v32.DeepseekV32Attention", "also reads its keys or values in 'kv_latent = "),
        ("plamo2.Attention", "does not call mlx-lm's scaled_dot_product_attention"),
        (
            "gemma2.Attention",
            "does not call mlx-lm's scaled_dot_product_attention, so nothing can stand in for it (soft-capped scores)",
        ),
        ("gear.Attention", "also reads its keys or values in 'output = _softcap_attention("),
        ("gemma4_text.Attention", "hands its keys and values to its caller"),
        ("iquestloopcoder.IQuestLoopCoderModel", "also reads its keys or values in 'out = layer.self_attn.attention("),
        ("llama.MLP", "calls update_and_fetch in a way that is not understood"),
    ],
)
def test_other_attention_stays_raw_and_the_reason_names_the_expression(path, reason):
    assert (why_not(model_class(path)) or "").startswith(f"{path} {reason}")


def tiny_block():
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=64,
    )
    return llama.TransformerBlock(args)


def test_the_module_of_a_layers_attention_is_the_one_to_bind():
    assert attention_modules(tiny_block()) == ([llama], None)


def test_a_whole_model_names_each_module_once():
    pair = nn.Module()
    pair.layers = [tiny_block(), tiny_block()]
    assert attention_modules(pair) == ([llama], None)


def test_a_layer_that_hands_rows_on_is_followed_through_its_model(monkeypatch):
    args = gemma4_text.ModelArgs(
        hidden_size=32, num_hidden_layers=8, intermediate_size=32, num_attention_heads=2, head_dim=16,
        global_head_dim=32, vocab_size=96, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8,
        num_kv_shared_layers=4, sliding_window_pattern=2,
    )  # fmt: skip
    model = gemma4_text.Model(args)
    assert attention_modules(model.layers[0], model) == ([gemma4_text], None)
    assert attention_modules(model.layers[0]) == ([], "gemma4_text.Attention hands its keys and values to its caller")
    looked_at = []
    monkeypatch.setattr(
        "mlx_turboquant.layers.attention_modules", lambda layer, model: looked_at.append(layer) or ([gemma4_text], None)
    )
    assert attention_of_layers(model, model.layers) == [([gemma4_text], None)] * 8
    assert len(looked_at) == 4  # sliding or full, with keys and values or without: each once


def test_attention_that_a_model_does_itself_is_bound_and_unbound():
    """This one fetches from the cache in the whole model's call and attends in its layers, twice per layer."""
    args = iquestloopcoder.ModelArgs.from_dict(
        {"model_type": "iquestloopcoder", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "rms_norm_eps": 1e-5,
         "loop_num": 2, "loop_window_size": 32, "max_position_embeddings": 512}
    )  # fmt: skip
    model = iquestloopcoder.Model(args)
    kinds = [type(c).__name__ for c in make_prompt_cache(model, kv_scheme="turbo4")]
    assert kinds == ["TurboQuantKVCache"] * 2 + ["RotatingKVCache"] * 2
    unhook(model)
    assert not is_bound(iquestloopcoder.__name__)
    hook(model)
    assert is_bound(iquestloopcoder.__name__)


def test_a_layer_without_attention_says_so():
    modules, reason = attention_modules(tiny_block().mlp)
    assert modules == []
    assert reason == "no attention that calls update_and_fetch was found in this layer"


def test_one_part_that_reads_its_keys_keeps_the_whole_layer_raw():
    layer = tiny_block()
    layer.indexer = deepseek_v32.Indexer.__new__(deepseek_v32.Indexer)
    nn.Module.__init__(layer.indexer)
    modules, reason = attention_modules(layer)
    assert modules == []
    assert reason == why_not(deepseek_v32.Indexer)

"""Tiny random models and the helpers that several test files share."""

import gc
import json
import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # on CUDA, MLX would multiply float32 with 10 bits of mantissa

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import deepseek_v3, llama


def tiny_llama(dim: int = 64, heads: int = 4, kv_heads: int = 2, layers: int = 2, dtype=mx.float32, seed: int = 0):
    """A random Llama whose attention is sharp enough that a wrong key changes its output."""
    mx.random.seed(seed)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=64,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        vocab_size=96,
        head_dim=dim,
    )
    model = llama.Model(args)
    for layer in model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight *= 3
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def tokens(count: int, seed: int = 1) -> mx.array:
    """(1, count) token ids below 96."""
    return mx.random.randint(0, 96, (1, count), key=mx.random.key(seed))


def decode(model, ids: mx.array, cache, start: int, stop: int) -> mx.array:
    """The logits (1, stop - start, 96) of single-token steps."""
    steps = [model(ids[:, i : i + 1], cache=cache) for i in range(start, stop)]
    return mx.concatenate(steps, axis=1)


def log_softmax(logits: mx.array) -> mx.array:
    """Log probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


# What other tests' caches of constants may let go while a test counts: a few rotations and codebooks.
LET_GO_BY_OTHERS = 16384


def memory_in_use() -> int:
    """MLX's active bytes with nothing pending: no garbage and no work that still holds its inputs."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def kld(exact: mx.array, other: mx.array) -> float:
    """Mean Kullback-Leibler divergence in nats of two arrays of logits."""
    exact, other = log_softmax(exact), log_softmax(other)
    return (mx.exp(exact) * (exact - other)).sum(-1).mean().item()


@pytest.fixture(scope="session")
def model():
    """A tiny float32 Llama, head size 64, 4 query and 2 key heads, 2 layers."""
    return tiny_llama()


@pytest.fixture
def random_rows():
    """A function (B, H, T, D, dtype) -> reproducible keys and values."""

    def make(B=1, H=2, T=200, D=64, dtype=mx.float16, seed=3):
        keys = mx.random.normal((B, H, T, D), key=mx.random.key(seed))
        values = mx.random.normal((B, H, T, D), key=mx.random.key(seed + 1))
        return keys.astype(dtype), values.astype(dtype)

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny random Llama in a folder that ``mlx_lm.load`` reads, with a word-per-number tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_llama")
    model = tiny_llama(seed=2)
    config = {key: value for key, value in vars(model.args).items() if value is not None}
    config |= {"architectures": ["LlamaForCausalLM"], "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 96)}}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompt():
    """150 words of the tiny tokenizer."""
    return " ".join(f"w{2 + (i * 37) % 94}" for i in range(150))


def tiny_latent():
    """Two layers of multi-head latent attention, which also reads its keys as arrays: none can be compressed."""
    args = deepseek_v3.ModelArgs(
        vocab_size=96, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=None, n_routed_experts=None, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=16, first_k_dense_replace=2,
    )  # fmt: skip
    return deepseek_v3.Model(args)

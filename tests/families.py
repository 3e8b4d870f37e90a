"""Every model family that the README names: a tiny model of the real architecture, and what its cache holds.

`python tests/families.py` prints the table that stands in the README.
"""

import importlib
import warnings
from dataclasses import dataclass, field

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_turboquant import make_prompt_cache, report

SLIDING = "a sliding window is bounded already: mlx-lm's rotating cache"
CHUNKED = "chunked attention is bounded already: mlx-lm's chunked cache"
RECURRENT = "a recurrent state, not keys and values"
SEVERAL = "several caches in one layer (CacheList): only a cache that is alone in its layer is compressed"
LATENT = (
    "deepseek_v3.DeepseekV3Attention also reads its keys or values in 'pe_scores = q_pe * self.scale @ "
    "k_pe.swapaxes(-1, -2)' (multi-head latent attention, whose cache is small already)"
)
SOFTCAP = (
    "gemma2.Attention does not call mlx-lm's scaled_dot_product_attention, so nothing can stand in for it "
    "(soft-capped scores)"
)

SHAPE = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 96, "rms_norm_eps": 1e-5, "num_hidden_layers": 2, "rope_theta": 10000.0,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
LINEAR = {
    "num_hidden_layers": 4, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "norm_topk_prob": True,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"]
GEMMA4 = {
    "global_head_dim": 64, "num_hidden_layers": 6, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16, "layer_types": ALTERNATING * 3, "sliding_window": 24,
}  # fmt: skip
GEMMA3 = {"num_hidden_layers": 4, "sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: of mlx-lm's module.
        why_raw: per cache, "" for a compressed one, else the exact reason in the report.
        config: what `SHAPE` does not say; under ``text_config`` if `nested`.
        note: for the table.
        head_norm: weight of the norms of queries and keys, where there are any.
    """

    name: str
    why_raw: tuple[str, ...]
    config: dict = field(default_factory=dict)
    nested: bool = False
    note: str = ""
    head_norm: float = 1.5

    @property
    def compressed(self) -> bool:
        """Whether any layer is."""
        return "" in self.why_raw


FAMILIES = [
    Family("llama", ("", "")),
    Family("qwen2", ("", ""), {"hidden_size": 128}),
    Family("qwen3", ("", "")),
    Family("qwen3_moe", ("", ""), EXPERTS),
    Family("mixtral", ("", ""), {"hidden_size": 128, "num_local_experts": 4}),
    Family("phi3", ("", ""), {"hidden_size": 128}),
    Family("glm4", ("", ""), {"attention_bias": True, "partial_rotary_factor": 0.5}),
    Family("olmo2", ("", "")),
    Family("cohere2", (SLIDING, "") * 2,
           {"hidden_size": 128, "num_hidden_layers": 4, "sliding_window": 24, "sliding_window_pattern": 2,
            "logit_scale": 1.0}),
    Family("gemma3", (SLIDING, "") * 2, GEMMA3, nested=True, head_norm=0.5),
    Family("gemma3n", (SLIDING, "") * 2,
           {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96, "sliding_window": 24,
            "rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0, "layer_types": ALTERNATING * 3,
            "activation_sparsity_pattern": [0.0] * 6, "hidden_size_per_layer_input": 16, "altup_num_inputs": 2,
            "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8},
           nested=True, head_norm=0.6,
           note="their keys and values are read by later layers too"),
    Family("gemma4_text", (SLIDING, "") * 2, GEMMA4, head_norm=0.6,
           note="their keys and values are read by later layers too"),
    Family("gemma4", (SLIDING, "") * 2,
           GEMMA4 | {"num_hidden_layers": 4, "num_kv_shared_layers": 0, "layer_types": ALTERNATING * 2,
                     "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0,
                     "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
           nested=True, head_norm=0.6, note="keys and values from one projection, in fewer and larger heads"),
    Family("gpt_oss", (SLIDING, "") * 2,
           {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24,
            "layer_types": ALTERNATING * 2}, note="with attention-sink logits"),
    Family("mimo_v2_flash", ("", SLIDING, ""),
           {"num_hidden_layers": 3, "hybrid_layer_pattern": [0, 1, 0], "v_head_dim": 16, "swa_head_dim": 32,
            "swa_v_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
            "swa_rope_theta": 10000.0, "sliding_window_size": 24, "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False, "moe_layer_freq": [0, 1, 1], "layernorm_epsilon": 1e-5,
            "partial_rotary_factor": 0.5, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_shared_experts": None, "routed_scaling_factor": 1.0, "moe_intermediate_size": 32,
            "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
            "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
           note="keys and values differ in size"),
    Family("llama4", (CHUNKED, CHUNKED, CHUNKED, ""),
           {"num_hidden_layers": 4, "attention_bias": False, "attention_chunk_size": 64, "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2, "num_experts_per_tok": 1, "num_local_experts": 4, "rope_scaling": None,
            "use_qk_norm": True}, nested=True),
    Family("qwen3_5", (RECURRENT, "") * 2, LINEAR, nested=True),
    Family("qwen3_next", (RECURRENT, "") * 2, LINEAR | EXPERTS | {"partial_rotary_factor": 0.5}),
    Family("nemotron_h", (RECURRENT, "", RECURRENT, ""),
           {"hybrid_override_pattern": list("M*-M*-"), "attention_bias": False, "mamba_num_heads": 2,
            "mamba_head_dim": 32, "mamba_proj_bias": False, "ssm_state_size": 32, "conv_kernel": 4, "n_groups": 1,
            "mlp_bias": False, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True}),
    Family("falcon_h1", (SEVERAL,) * 2,
           {"mamba_d_head": 32, "mamba_d_ssm": 64, "mamba_d_state": 32, "mamba_n_heads": 2}),
    Family("deepseek_v3", (LATENT,) * 2,
           {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32,
            "first_k_dense_replace": 2}),
    Family("gemma2", (SOFTCAP,) * 2, {"query_pre_attn_scalar": 32.0}),
]  # fmt: skip


def tiny_model(family: Family):
    """A random float32 model of this family whose attention is sharp enough that a wrong key shows in its output."""
    mx.random.seed(7)
    module = importlib.import_module(f"mlx_lm.models.{family.name}")
    config = {"model_type": family.name, **SHAPE, **family.config}
    if family.nested:
        config = {"model_type": family.name, "vocab_size": SHAPE["vocab_size"], "text_config": config}
    model = module.Model(module.ModelArgs.from_dict(config))
    sharper = []
    for name, array in tree_flatten(model.parameters()):
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj") and array.ndim == 2:
            array = array * 3
        elif part in ("q_norm", "k_norm"):
            array = mx.full(array.shape, family.head_norm)
        elif name.endswith("sinks"):
            array = mx.random.normal(array.shape)
        sharper.append((name, array))
    model.update(tree_unflatten(sharper))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def made_cache(model, scheme: str) -> list:
    """`make_prompt_cache`; that a family can have no compressed layer is in `Family.why_raw`, not a warning here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*No layer of this model can be stored as")
        return make_prompt_cache(model, kv_scheme=scheme)


def family_table() -> str:
    """The README's table of families in Markdown, from the reports of their tiny models' caches."""
    rows: dict[tuple[str, str], list[str]] = {}
    for family in FAMILIES:
        layers = report(made_cache(tiny_model(family), "turbo4")).layers
        raw = {layer.why_raw: None for layer in layers if layer.scheme == "raw"}
        compressed = [layer for layer in layers if layer.scheme != "raw"]
        what = "nothing" if not compressed else "every layer" if not raw else "layers of full attention"
        what += f"; {family.note}" if family.note else ""
        rows.setdefault((what, "; ".join(raw) or "nothing"), []).append(family.name)
    lines = ["| family | what is compressed | what stays raw, and why |", "| --- | --- | --- |"]
    lines += [f"| {', '.join(names)} | {what} | {raw} |" for (what, raw), names in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(family_table())

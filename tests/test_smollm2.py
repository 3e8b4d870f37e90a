"""One real model from end to end: SmolLM2-135M, its own tokenizer, a compressed cache, a file, an answer."""

from pathlib import Path

import mlx.core as mx
import pytest

import mlx_turboquant

ROOT = Path(__file__).resolve().parents[1]
TEXT = "émigré, 2024\n  x"
pytestmark = pytest.mark.smollm2


def test_smollm2_answers_from_a_compressed_restored_prompt(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import smollm2

    model, tokenizer = smollm2.load()
    # Digits one by one, and text survives.
    assert len(tokenizer.encode("2024")) == 4 and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    notes = (
        "The capital of France is Paris. On Monday the wind was strong and the keeper cleaned the great "
        "lens. On Tuesday he painted the iron door green. On Wednesday a supply boat brought oil, rope and flour. "
        "On Thursday he wrote a long letter to his sister in the village. On Friday the fog came and he rang the bell."
    )
    question = notes + " What is the capital of France?"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    cache = mlx_turboquant.make_prompt_cache(model, kv_scheme="turbo4")
    exact = mlx_turboquant.make_prompt_cache(model, kv_scheme="fp16")
    for c in (cache, exact):
        model(mx.array(ids[:-1])[None], cache=c)
        mx.eval([layer.state for layer in c])
    for layer in cache:
        assert layer.compress() == 64
    path = mlx_turboquant.save_prompt_cache(tmp_path / "notes", cache)
    restored = mlx_turboquant.load_prompt_cache(path, model=model, kv_scheme="turbo4")
    logs = []
    for c in (exact, cache, restored):
        logits = model(mx.array(ids[-1:])[None], cache=c)[0, -1].astype(mx.float32)
        logs.append(logits - mx.logsumexp(logits))
    assert mx.array_equal(logs[1], logs[2])
    assert (mx.exp(logs[0]) * (logs[0] - logs[1])).sum() < 0.05
    first = int(logs[2].argmax())
    words = [first]
    for token, _ in mlx_turboquant.generation._mlx_lm.generate_step(
        mx.array([first]), model, prompt_cache=restored, max_tokens=10
    ):
        words.append(token)
    assert "Paris" in tokenizer.decode(words)
    told = mlx_turboquant.report(restored)
    assert len(told.layers) == 30 and all(layer.block_tokens == 64 for layer in told.layers)

"""One of the processes that `test_distributed` starts: ``distributed_rank.py FOLDER``.

It generates on its share of the models in FOLDER/tensor/model and FOLDER/pipeline/model, saves and loads prompt caches
beside them, and writes what it saw to ``seen{rank}.json`` there, for the tests to judge.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import sharded_load

from mlx_turboquant import fingerprint, load_prompt_cache, make_prompt_cache, report, save_prompt_cache

PROMPT = [2 + (i * 37) % 94 for i in range(150)]
QUESTION = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41]
NEW_TOKENS = 70  # the prompt's two blocks are encoded in the first step, one more in the 63rd
RAW_TOKENS = 20


def greedy(model, ids, cache, count):
    """(ids of the most likely next tokens, the smallest distance to the second most likely in nats).

    The prompt is read in chunks of 64 tokens, so that the stages of a pipeline hand over several.
    """
    found, margins = [], []
    steps = generate_step(mx.array(ids), model, prompt_cache=cache, max_tokens=count, prefill_step_size=64)
    for token, logprobs in steps:  # no end-of-sequence token stops it
        best = mx.sort(logprobs)[-2:]
        found.append(int(token))
        margins.append((best[1] - best[0]).item())
    return found, min(margins)


def answer(model, cache):
    """The tokens of a later turn."""
    return greedy(model, QUESTION, cache, 20)[0]


def refusal(path, model):
    """The message with which a file is refused; "" if it is not."""
    try:
        load_prompt_cache(path, model=model)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def see(folder: Path, rank: int, size: int, **groups) -> None:
    """Write the file of one rank for one model."""
    model, _ = sharded_load(str(folder / "model"), **groups)
    cache = make_prompt_cache(model, kv_scheme="turbo4")
    found, _ = greedy(model, PROMPT, cache, NEW_TOKENS)
    held = {"layers": len(cache), "heads": cache[0].keys.shape[1], "block_tokens": [c.block_tokens for c in cache]}
    keys, values = cache[0].keys_and_values()
    mx.save_safetensors(str(folder / f"rows{rank}"), {"keys": keys.dense(), "values": values.dense()})

    saved = save_prompt_cache(folder / "notes", cache, {"rank": str(rank)})
    went_on = answer(model, cache)
    loaded, metadata = load_prompt_cache(folder / "notes.safetensors", True, model=model, kv_scheme="turbo4")
    by_group = load_prompt_cache(folder / "notes.safetensors")  # without the model, mlx.launch's group says the rank

    raw = make_prompt_cache(model, kv_scheme="fp16")
    raw_found, _ = greedy(model, PROMPT, raw, RAW_TOKENS)
    raw_saved = save_prompt_cache(folder / "raw", raw, model=model)
    try:
        save_prompt_cache(folder / "raw", raw)
        unmarked = ""
    except ValueError as error:
        unmarked = str(error)
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))  # every rank has written its files

    other = f"rank{(rank + 1) % size}of{size}"
    seen = held | {
        "fingerprint": fingerprint(model),
        "found": found,
        "raw_found": raw_found,
        "report": str(report(cache)),
        "saved": [saved.name, raw_saved.name],
        "metadata_rank": metadata["rank"],
        "went_on": [went_on, answer(model, loaded), answer(model, by_group)],
        "raw_loaded": load_prompt_cache(folder / "raw.safetensors", model=model)[0].offset,
        "unmarked": unmarked,
        "refused": {
            "another rank": refusal(folder / f"notes.{other}.safetensors", model),
            "another rank, raw": refusal(folder / f"raw.{other}.safetensors", model),
            "one process": refusal(folder / "whole.safetensors", model),
            "nothing": refusal(folder / "nothing.safetensors", model),
        },
    }
    (folder / f"seen{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    world = mx.distributed.init()
    see(Path(sys.argv[1]) / "tensor", world.rank(), world.size(), tensor_group=world)
    see(Path(sys.argv[1]) / "pipeline", world.rank(), world.size(), pipeline_group=world)

"""Whole files of every kind that the package reads, and what reading a spoiled one must end in."""

import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_llama, tokens
from mlx_lm.models import cache as mlx_lm_cache
from spoiling import spoil

import mlx_turboquant
from mlx_turboquant import scheme_file
from mlx_turboquant.cli.vector_files import open_vectors, open_whole_numbers
from mlx_turboquant.index import TurboQuantIndex
from mlx_turboquant.reference_logits import ReferenceLogits

LONGEST_MESSAGE = 700
SECONDS = 1.0
BYTES = 64 << 20


class Reader(NamedTuple):
    """A kind of file: a whole one (made once), its suffix, and what reads it and uses what it gave."""

    whole: Callable[[], bytes]
    suffix: str
    read: Callable[[Path], None]


# --- whole files


def _saved(save: Callable[[Path], Any], suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"whole{suffix}"
        save(path)
        return path.read_bytes()


def prompt_cache(*schemes: str, count: int = 100) -> list:
    """A filled cache of a tiny model, one layer of each scheme, compressed."""
    model = tiny_llama(layers=len(schemes))
    layers = tuple(mlx_turboquant.KVScheme.parse(text) for text in schemes)
    cache = mlx_turboquant.make_prompt_cache(model, kv_scheme=scheme_file.LayerSchemes(layers))
    model(tokens(count), cache=cache)
    model(tokens(1), cache=cache)
    return cache


def mlx_lms_caches() -> list:
    """One of each of mlx-lm's caches, filled as its own functions fill it."""
    keys, values = mx.zeros((1, 2, 5, 32), mx.bfloat16), mx.ones((1, 2, 5, 32), mx.bfloat16)
    made = [
        mlx_lm_cache.KVCache(), mlx_lm_cache.QuantizedKVCache(32, 4), mlx_lm_cache.RotatingKVCache(4, 1),
        mlx_lm_cache.ChunkedKVCache(8), mlx_lm_cache.ConcatenateKVCache(), mlx_lm_cache.BatchKVCache([0]),
        mlx_lm_cache.BatchRotatingKVCache(4, [0]), mlx_lm_cache.CacheList(mlx_lm_cache.KVCache()),
        mlx_lm_cache.KVCache(),
    ]  # fmt: skip
    for cache in made[:-1]:
        (cache[0] if isinstance(cache, mlx_lm_cache.CacheList) else cache).update_and_fetch(keys, values)
    arrays = mlx_lm_cache.ArraysCache(2)
    arrays[0] = mx.zeros((1, 3, 8))
    return [*made, arrays]


def _filled_index() -> TurboQuantIndex:
    index = TurboQuantIndex(12, 2.5, "l2", keep="int8")
    index.add(np.random.default_rng(0).standard_normal((9, 12)))
    return index


def _fvecs(path: Path) -> None:
    rows = np.zeros((5, 4), np.int32)
    rows[:, 0], rows[:, 1:] = 3, np.ones((5, 3), np.float32).view(np.int32)
    path.write_bytes(rows.tobytes())


@functools.cache
def _model():
    return tiny_llama(layers=1)


IDS = list(range(2, 14))


def _logits(path: Path) -> None:
    steps = {str(i): mx.ones((min(3, 11 - i), 96), mx.float16) for i in range(4, 11, 3)}
    mx.save_safetensors(str(path), steps)


# --- reading


def read_prompt_cache(path: Path) -> None:
    """Load it, and use what was loaded as a model would: a wrong cache shows here."""
    for cache in mlx_turboquant.load_prompt_cache(path):
        _use(cache)


def _use(cache: Any) -> None:
    if isinstance(cache, mlx_lm_cache.CacheList):
        return [_use(inner) for inner in cache.caches] and None
    if isinstance(cache, mlx_lm_cache.ArraysCache):
        mx.eval(cache.state)
        return None
    state = cache.state
    if isinstance(cache, mlx_turboquant.TurboQuantKVCache):
        assert cache.offset == cache.size() + cache._dropped
        cache.module = ""  # no model stands behind it
        dims, dtype = state[5], state[6]
        B, H, D, V = dims or (1, 1, 64, 64)
        dtype = getattr(mx, dtype or "float16")
    elif cache.keys is None:
        assert (cache._offset if hasattr(cache, "_offset") else np.max(np.array(cache.offset))) <= 0
        return None
    elif isinstance(cache, mlx_lm_cache.QuantizedKVCache):
        (B, H, _, _), V = cache.keys[0].shape, cache.values[1].shape[3] * cache.group_size
        D, dtype = cache.keys[1].shape[3] * cache.group_size, cache.keys[1].dtype
    else:
        (B, H, _, D), V, dtype = cache.keys.shape, cache.values.shape[3], cache.keys.dtype
    if max(B * H * D, B * H * V) > 1 << 20:  # a room of 256 tokens of such rows is no fault of the reader
        return None
    if not min(B, H, D):
        return None
    before = cache.size()
    mx.eval(cache.update_and_fetch(mx.zeros((B, H, 1, D), dtype), mx.zeros((B, H, 1, V), dtype)), cache.state)
    assert cache.size() >= before or before == 0 or isinstance(cache, mlx_turboquant.TurboQuantKVCache)
    return None


def read_index(path: Path) -> None:
    """Load it and search."""
    index = TurboQuantIndex.load(path)
    scores, ids = index.search(np.ones((1, index.d), np.float32), 3)
    assert scores.shape == ids.shape == (1, 3)


def read_logits(path: Path) -> None:
    """As evaluate does; that they are computed again is said in a warning."""
    reference = ReferenceLogits(_model(), IDS, 4, 3)
    path = path.rename(_logits_path(reference))
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            reference = ReferenceLogits(_model(), IDS, 4, 3)
        if said:
            raise ValueError(str(said[0].message))
        for start in range(4, 11, 3):
            assert reference.get(start, None).shape == (min(3, 11 - start), reference.get(4, None).shape[1])
            mx.eval(reference.get(start, None))
    finally:
        path.unlink(missing_ok=True)


def _logits_path(reference: ReferenceLogits) -> Path:
    reference._path.parent.mkdir(parents=True, exist_ok=True)
    return reference._path


def _vectors(path: Path) -> None:
    np.asarray(open_vectors(str(path))).sum()


READERS = {
    "prompt cache": Reader(
        functools.cache(
            lambda: _saved(
                lambda path: mlx_turboquant.save_prompt_cache(
                    path, prompt_cache("turbo4", "fp16", "qjl4:block=16,window=0"), {"topic": "a.b"}
                ),
                ".safetensors",
            )
        ),
        ".safetensors",
        read_prompt_cache,
    ),
    "prompt cache of mlx-lm": Reader(
        functools.cache(
            lambda: _saved(lambda path: mlx_lm_cache.save_prompt_cache(str(path), mlx_lms_caches()), ".safetensors")
        ),
        ".safetensors",
        read_prompt_cache,
    ),
    "index": Reader(functools.cache(lambda: _saved(_filled_index().save, ".tqi")), ".tqi", read_index),
    "scheme file": Reader(
        lambda: b'{"format": 1, "model": "0123", "layers": ["turbo4v3", "fp16"], "note": [1.5, null]}',
        ".json",
        scheme_file.load,
    ),
    "npy": Reader(
        functools.cache(lambda: _saved(lambda path: np.save(path, np.ones((5, 3), np.float16)), ".npy")),
        ".npy",
        _vectors,
    ),
    "fvecs": Reader(functools.cache(lambda: _saved(_fvecs, ".fvecs")), ".fvecs", _vectors),
    "ivecs": Reader(
        functools.cache(lambda: _saved(_fvecs, ".ivecs")), ".ivecs", lambda path: open_whole_numbers(str(path)).sum()
    ),
    "logits": Reader(functools.cache(lambda: _saved(_logits, ".safetensors")), ".safetensors", read_logits),
}


def verdict(reader: Reader, path: Path) -> str:
    """What is wrong with how a file was read; "" if it was read, or refused in one clear line."""
    size = path.stat().st_size
    _forget_peak()
    memory, start = _memory("VmRSS"), time.process_time()
    try:
        reader.read(path)
    except ValueError as error:
        text = str(error)
        if not text.startswith("[") or path.suffix not in text or not text.isprintable():
            return f"unclear: {text[:300]!r}"
        if len(text.replace(str(path), "")) > LONGEST_MESSAGE:
            return f"{len(text)} letters: {text[:300]!r}"
    except OSError as error:
        if str(path) not in str(error):
            return f"no path: {error!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    if (seconds := time.process_time() - start) > SECONDS:
        return f"{seconds:.1f} s"
    if (more := _memory("VmHWM") - memory - size) > BYTES:
        return f"{more >> 20} MiB beyond its own"
    return ""


def _memory(name: str) -> int:
    """Bytes of this process that Linux tells of; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def spoiled_case(seed: int, number: int) -> tuple[str, bytes]:
    """Case `number` of a run: which reader, and the file."""
    rng = random.Random(f"{seed}:{number}")
    name = rng.choice((*READERS, "prompt cache", "prompt cache", "prompt cache of mlx-lm"))
    return name, spoil(rng, READERS[name].whole(), READERS[name].suffix)


def own_cache_folder(folder: str | os.PathLike) -> None:
    """Keep what the logits' reader reads and writes away from the user's own."""
    os.environ["XDG_CACHE_HOME"] = str(folder)


def read(name: str, path: Path, data: bytes) -> None:
    """Read it as the reader of this name does; what it ends in is checked."""
    path = path / f"spoiled{READERS[name].suffix}"
    path.write_bytes(data)
    assert verdict(READERS[name], path) == ""
    path.unlink(missing_ok=True)


def refused(name: str, path: Path, data: bytes, message: str) -> None:
    """The same, and it must be refused with these words."""
    read(name, path, data)
    path = path / f"spoiled{READERS[name].suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        READERS[name].read(path)


def run_script(name: str, *arguments: str) -> dict:
    """What a script of this folder tells in its last line, run in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

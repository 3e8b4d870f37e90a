"""Write tests/data/formats: a small file of every kind in its current version, and what each stands for.

python scripts/write_format_files.py             writes what is not there yet
python scripts/write_format_files.py --replace   writes the current versions again, before they are released

Files of older versions are never touched: they stay, so that a test says what becomes of each.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from format_files import EXPECTED, FOLDER, expected, told

from mlx_turboquant import KVScheme, TurboQuantIndex, TurboQuantKVCache, save_prompt_cache, scheme_file
from mlx_turboquant.cache import RawLayerCache
from mlx_turboquant.cache.saved_state import FORMAT_VERSION
from mlx_turboquant.index.file import VERSION as INDEX_VERSION

MARK = "0123456789abcdef"  # in place of a model's fingerprint
# name -> scheme, head size of keys, of values, dtype, prompt, decoded, bound
CACHES = {
    "turbo4": ("turbo4:block=16,window=3,sinks=2", 32, 16, mx.float16, 40, 2, None),
    "turbo3.5": ("turbo3.5v2.5:block=16,window=3,sinks=2", 32, 32, mx.float16, 40, 2, None),
    "turbo3": ("turbo3v2:block=16,window=3,sinks=2,rotation=dense,seed=7", 24, 24, mx.float32, 40, 2, None),
    "squat3": ("squat3:block=16,window=3,group=16", 16, 16, mx.float16, 40, 2, None),
    "qjl4": ("qjl4:block=16,window=3,sinks=2", 32, 32, mx.bfloat16, 40, 2, None),
    "int8": ("int8:block=16,window=3,sinks=1,center=1,balance=1", 32, 32, mx.float16, 40, 2, None),
    "outlier4": ("outlier4:block=16,window=3", 32, 32, mx.float16, 40, 2, None),
    "affine4_rotated": ("affine4:block=16,window=3,group=32,rotation=hadamard", 32, 32, mx.float16, 40, 2, None),
    "turbo0v4": ("turbo0v4:block=16,window=3,sinks=2", 16, 16, mx.float16, 40, 2, None),
    "bounded": ("turbo4:block=16,window=3,sinks=2", 32, 32, mx.float16, 60, 20, 64),
    "raw": ("turbo4:block=16,window=3,sinks=2", 32, 32, mx.float16, 40, 0, None),
}
INDEXES = {
    "4_cosine": dict(d=32, bits=4, metric="cosine", keep="float16"),
    "2_l2": dict(d=48, bits=2, metric="l2", seed=3),
    "2.5_ip": dict(d=32, bits=2.5, metric="ip", keep="int8"),
}


def write_cache(path: Path, scheme: str, dim: int, value_dim: int, dtype, prompt: int, decoded: int, bound) -> None:
    """A compressed layer of 2 heads after so many tokens; without decoded ones, beside a layer that stays raw."""
    random = np.random.default_rng(len(path.name))

    def rows(count: int, size: int, heads: int = 2) -> mx.array:
        return mx.array(random.standard_normal((1, heads, count, size)).astype(np.float32)).astype(dtype)

    layers = [TurboQuantKVCache(scheme, 0, "", MARK, bound)]
    layers[0].update_and_fetch(rows(prompt, dim) + 0.5, rows(prompt, value_dim))
    layers[0].observe_queries(rows(prompt, dim, 4))
    for _ in range(decoded):
        layers[0].update_and_fetch(rows(1, dim) + 0.5, rows(1, value_dim))
    if not decoded:
        # Its own update makes room for 256 tokens, and mlx-lm would write that.
        layers.append(RawLayerCache.from_state((rows(8, dim), rows(8, value_dim), 8)))
    save_prompt_cache(path, layers, {"topic": "formats"})


def write_index(path: Path, **settings) -> None:
    """20 vectors with ids of their own, one of them removed."""
    index = TurboQuantIndex(**settings)
    x = np.random.default_rng(settings["d"]).standard_normal((20, settings["d"])).astype(np.float32)
    index.add(x, np.arange(100, 120))
    index.remove_ids([104])
    index.save(path)


def write_schemes(path: Path) -> None:
    """A plan for four layers, with notes."""
    layers = tuple(map(KVScheme.parse, ("turbo4v3", "fp16", "turbo4v2:window=32", "squat3")))
    scheme_file.save(path, scheme_file.LayerSchemes(layers, MARK), kld=0.01, nbytes=12345, context=4096, name="tiny")


def write_logits(path: Path) -> None:
    """Two calls of two tokens over 40 words, named by the token they begin with."""
    x = np.random.default_rng(0).standard_normal((2, 2, 40)).astype(np.float32)
    mx.save_safetensors(str(path), {"0": mx.array(x[0]), "2": mx.array(x[1])})


def current() -> dict:
    """Name -> function that writes the file."""
    writers = {
        f"prompt_cache_v{FORMAT_VERSION}_{name}.safetensors": lambda path, a=arguments: write_cache(path, *a)
        for name, arguments in CACHES.items()
    }
    for name, settings in INDEXES.items():
        writers[f"index_v{INDEX_VERSION}_{name}.tqi"] = lambda path, s=settings: write_index(path, **s)
    writers[f"schemes_v{scheme_file.FORMAT}.json"] = write_schemes
    writers["logits_v1.safetensors"] = write_logits
    return writers


def main() -> None:
    """Write files and expected.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replace", action="store_true", help="write files of the current versions that are there too")
    replace = parser.parse_args().replace
    FOLDER.mkdir(parents=True, exist_ok=True)
    known = expected() if EXPECTED.exists() else {}
    for name, write in current().items():
        if replace or not (FOLDER / name).exists():
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder) / name)
                known[name] = told(Path(folder) / name)
                (FOLDER / name).write_bytes((Path(folder) / name).read_bytes())
            print(f"{name}: {(FOLDER / name).stat().st_size:,} bytes")
    lines = (f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known))
    EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

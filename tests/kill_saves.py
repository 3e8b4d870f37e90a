"""Kill processes while they save a prompt cache, an index or a plan, and look at what is left.

    python tests/kill_saves.py --times 200

A child saves one version of a file after the other and says when it begins; SIGKILL comes at a random moment of it.
Afterwards the file must be whole, and be the version that was being saved or the one before. What a killed save leaves
beside it must be gone after the next. Ends with one line of JSON.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import scipy.stats  # noqa: F401  (once here, and not in every child: codebooks import it where they need it)
from mlx_lm.models.cache import KVCache

import mlx_turboquant
from mlx_turboquant import scheme_file
from mlx_turboquant.index import TurboQuantIndex


def prompt_caches(path: Path) -> tuple[Callable[[int], Any], Callable[[], int]]:
    """What saves a version and what loads one and says which, of a prompt cache of 5 MB."""

    def save(version: int) -> None:
        raw, ours = KVCache(), mlx_turboquant.TurboQuantKVCache("turbo4")  # not compressed yet: that takes a second
        rows = mx.full((1, 4, 2048, 128), version % 2048, mx.float16)  # whole numbers that float16 can hold
        raw.update_and_fetch(rows, rows)
        ours.update_and_fetch(rows[:, :, :200], rows[:, :, :200])
        mlx_turboquant.save_prompt_cache(path, [raw, ours], {"version": str(version)})

    def load() -> int:
        (raw, ours), metadata = mlx_turboquant.load_prompt_cache(path, return_metadata=True)
        version = int(metadata["version"])
        assert mx.all(mx.stack(raw.keys_and_values()) == version % 2048).item() and ours.size() == 200
        return version

    return save, load


def indexes(path: Path) -> tuple[Callable[[int], Any], Callable[[], int]]:
    """The same of an index of 2 MB, whose newest id is the version."""
    index = TurboQuantIndex(256, 8, keep="float16")

    def save(version: int) -> None:
        if not index.ntotal:
            index.add(np.ones((2000, 256), np.float32))
        index.add(np.ones((1, 256), np.float32), ids=[version + 2000])
        index.save(path)

    def load() -> int:
        loaded = TurboQuantIndex.load(path)
        assert (loaded.search(np.ones((1, 256), np.float32), 5)[1] >= 0).all()
        return int(loaded.ids[-1]) - 2000

    return save, load


def plans(path: Path) -> tuple[Callable[[int], Any], Callable[[], int]]:
    """The same of a plan."""
    schemes = scheme_file.LayerSchemes(tuple(mlx_turboquant.KVScheme.parse("turbo4") for _ in range(64)))

    def load() -> int:
        assert scheme_file.load(path).layers == schemes.layers
        return json.loads(path.read_text())["version"]

    return lambda version: scheme_file.save(path, schemes, version=version), load


_FIRST = 2  # the version that lies there before the first kill; saves before it are timed
KINDS = {"cache.safetensors": prompt_caches, "index.tqi": indexes, "plan.json": plans}


def kill_saves(times: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kill so many saves, one kind after the other in turn, into files of a folder.

    Returns:
        How many were killed, how many left the new version and how many the old, the kills that left something beside
        the file, the most files that lay there at once and those that lay there after a last save of each.

    Raises:
        AssertionError: if a file is not whole, or of another version.
    """
    rng = random.Random(seed)
    told = dict.fromkeys(("killed", "new", "old", "left_something", "most_leftovers"), 0)
    files = [(folder / name, *make(folder / name)) for name, make in KINDS.items()]
    versions = dict.fromkeys(range(len(files)), _FIRST)
    lasts = {}
    for which, (_, save, _) in enumerate(files):
        lasts[which] = _in_child(lambda save=save: _timed(save))
    for number in range(times):
        which = number % len(files)
        path, save, load = files[which]
        begun = _killed_while_saving(save, versions[which] + 1, rng.uniform(0, 2 * lasts[which]))
        left = leftovers(folder)
        found = _in_child(load)
        assert found in (begun - 1, begun), f"{path.name}: version {begun} was being saved, {found:.0f} is there"
        versions[which] = int(found)
        told["killed"] += 1
        told["new" if found == begun else "old"] += 1
        told["left_something"] += bool(left)
        told["most_leftovers"] = max(told["most_leftovers"], len(left))
    for which, (_, save, load) in enumerate(files):
        last = versions[which] + 1
        assert _in_child(lambda save=save, load=load, last=last: (save(last), load())[1]) == last
    return told | {"leftovers_after_a_last_save": len(leftovers(folder))}


def leftovers(folder: Path) -> list[str]:
    """What lies in a folder and is no file of ours by name."""
    return [name for name in os.listdir(folder) if name not in KINDS]


def _timed(save: Callable[[int], Any]) -> float:
    for version in range(_FIRST + 1):
        start = time.perf_counter()
        save(version)
    return time.perf_counter() - start


def _in_child(work: Callable[[], float]) -> float:
    """What a function returns, called in a child: this process never computes, so that its children may."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, struct.pack("<d", work()))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as told:
        result = told.read()
    os.waitpid(child, 0)
    assert len(result) == 8, "the file that was left cannot be loaded, see above"
    return struct.unpack("<d", result)[0]


def _killed_while_saving(save: Callable[[int], Any], first: int, after_seconds: float) -> int:
    """Let a child save versions from the first on, kill it so long after the second began; the last that it began."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            for version in range(first, first + 1_000_000):
                os.write(write, struct.pack("<q", version))
                save(version)
        os._exit(1)
    os.close(write)
    with open(read, "rb") as told:
        begun = told.read(16)  # the first save of a process builds things
        time.sleep(after_seconds)
        os.kill(child, signal.SIGKILL)
        begun += told.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended before it was killed: a save failed"
    return struct.unpack("<q", begun[len(begun) - 8 :])[0]


def main() -> None:
    """Kill and tell."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--times", type=int, default=200, help="how many kills (200)")
    out.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = out.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill_saves(args.times, Path(folder), args.seed)))


if __name__ == "__main__":
    main()

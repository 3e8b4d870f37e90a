"""Predict, from counts, how long attention over a compressed cache takes on Apple GPUs that nobody has measured.

    python benchmarks/apple_model.py [--counts] [--heads 32x8x128] [--tokens 1024,8192,32768,131072] [--lookup one]

Nothing here is measured on a Mac. A time is the larger of two, plus the dispatches: the bytes of the cache over the
share of the memory's bandwidth that reading reaches, and the instructions of the kernel over the rate of the GPU, each
kind with its published cycles, one after the other. The instructions are those of the loop in kernels/attend.metal, in
optimised LLVM code (tests/metal_emu/instructions.py; Linux). The same sum for an H200, where the same text was
measured, says how far off it is. docs/performance.md explains method, sources and limits.

`--lookup` says how codes are looked up: `arithmetic` as Macs do (kernels/codes.h), or, for comparison, as NVIDIA's GPUs
do, by a simd_shuffle in which each lane names the lane it reads: `sequence` at the cost measured on M1 (the compiler
makes several instructions of it), `one` as if it were a single shuffle. `--counts` adds the counts behind it for head
sizes of 64 to 256, each way.
Prints tables and one line of JSON.
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from gpu_figures import (
    APPLE,
    H200,
    MACHINES,
    MEASURED,
    MODELS,
    OTHER_DISPATCHES,
    REGISTERS,
    Heads,
    Machine,
    Model,
)

from mlx_turboquant.ops import attend as kernel
from mlx_turboquant.quantizers import make_quantizers
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.tensor import PackedTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the emulator, which reads the kernels' text
SCHEMES = ("turbo8v4", "turbo4", "turbo3", "turbo2")
TILE, LANES, SCHEDULERS = 16, 32, 4
LOOKUPS = ("arithmetic", "sequence", "one")


@dataclass(frozen=True)
class Cost:
    """What one key (a token of one KV head, with its value) costs.

    Attributes:
        counts: instructions of 32 lanes, by kind.
        code_bytes: of codes loaded by all lanes; threadgroup_bytes: read from threadgroup memory by all lanes.
        kept: numbers a lane keeps from tile to tile.
    """

    counts: dict[str, float]
    code_bytes: float
    threadgroup_bytes: float
    kept: int

    def cycles(self, machine: Machine, lookup: float | None = None) -> float:
        """Cycles of one core, all kinds one after the other; `lookup` in place of the machine's own."""
        each = machine.cycles if lookup is None else machine.cycles | {"lookup": lookup}
        issued = sum(count * each[kind] for kind, count in self.counts.items()) / SCHEDULERS
        return issued + self.threadgroup_bytes / machine.threadgroup_bytes


def bytes_per_key(scheme: KVScheme, D: int) -> float:
    """Stored bytes of one key and its value: codes, scales and its share of the block's centre; float16."""
    total = 0
    for side in make_quantizers(scheme, D, D, mx.float16):
        shapes, dtypes = side.layout(1, 1, scheme.block)
        total += sum(d.size * math.prod(s) for s, d in zip(shapes, dtypes, strict=True) if s is not None)
    return total / scheme.block


def split(scheme: KVScheme, tokens: int) -> tuple[int, int]:
    """Packed and raw tokens right after a prompt of so many was compressed."""
    packed = max(tokens - scheme.sinks - scheme.window, 0) // scheme.block * scheme.block
    return packed, tokens - packed


@lru_cache
def calls(scheme: KVScheme, heads: Heads, tokens: int, by_exchange: bool = False) -> list:
    """The kernels that one step's attention dispatches on Metal, with their arguments; nothing runs.

    by_exchange: with lookups as on NVIDIA's GPUs.
    """
    import kernel_emulator

    packed, raw = split(scheme, tokens)
    H, Hkv, D = heads

    def side(quantizer) -> kernel.StoredSide:
        shapes, dtypes = quantizer.layout(1, Hkv, packed)
        arrays = (None if s is None else mx.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True))
        rows = (mx.zeros((1, Hkv, n, D), mx.float16) for n in (scheme.sinks, raw))
        bits, rotation, projection = quantizer.fused
        return kernel.StoredSide(bits, PackedTensor(*arrays), *rows, rotation, projection)

    keys, values = make_quantizers(scheme, D, D, mx.float16)
    with kernel_emulator.noting() as noted:
        kernel.attend(
            mx.zeros((1, H, 1, D), mx.float16),
            *(side(keys), side(values), ((scheme.sinks, packed, raw - scheme.sinks),)),
            **{"scale": D**-0.5, "block": scheme.block, "balance": mx.ones((1, Hkv, D))},
            backend="emulator-exchange" if by_exchange else "emulator",
        )
    return noted


def moved_share(tiles: int, rows: int) -> float:
    """Share of a walk's tiles in which the largest score of any row moves, if the order of tokens means nothing.

    Tile t holds the largest of t tiles with probability 1/t (records of exchangeable numbers), each row by itself.
    """
    return sum(1 - (1 - 1 / t) ** rows for t in range(1, tiles + 1)) / max(tiles, 1)


@lru_cache
def costs(scheme: KVScheme, heads: Heads, tokens: int, by_exchange: bool = False) -> tuple[Cost, Cost]:
    """(of a packed key, of a raw one) in a step over so many tokens; by_exchange as for `calls`.

    Raises:
        ValueError: if the tokens fit into the single pass, whose time is mostly not in its loops.
    """
    from metal_emu.instructions import count_loop

    noted = calls(scheme, heads, tokens, by_exchange)
    if len(noted) != 2:
        raise ValueError(f"[costs] wanted tokens for two passes, got {tokens}. Take 1024 or more.")
    emulated, call = noted[0]
    rows = call["output_shapes"][0][0]
    again = call["grid"][1] // heads.Hkv  # threadgroups that take other query rows of the same keys
    walk = split(scheme, tokens)[0] // TILE // (call["output_shapes"][0][1] * call["threadgroup"][0] // LANES)
    moved = moved_share(max(walk, 1), rows // heads.Hkv // again)

    def cost(reads: tuple[str, ...]) -> Cost:
        loop = count_loop(emulated.instance(**call), reads)
        counts, read, shared = Counter(), 0.0, 0.0
        for part in loop.parts:
            # What runs in some turns: the rescaling, the block's centre, loads of the next keys (all turns but the
            # last) and stores by some lanes, which take the simdgroup's time all the same.
            share = moved if part.voted else TILE / scheme.block if part.bytes_read["k_centers"] else 1.0
            for kind, count in part.counts.items():
                counts[kind] += count * share * again / TILE
            read += sum(n for name, n in part.bytes_read.items() if "codes" in name) * LANES * again / TILE
            shared += part.threadgroup_bytes * share * LANES * again / TILE
        return Cost({kind: count for kind, count in counts.items() if count}, read, shared, loop.kept)

    return cost(("k_codes", "v_codes")), cost(("tail_k", "tail_v"))


class Prediction(NamedTuple):
    """One layer's attention: us together, of the memory, of the instructions."""

    us: float
    memory_us: float
    compute_us: float


def attention(machine: Machine, name: str, heads: Heads, tokens: int, lookup: str = LOOKUPS[0]) -> Prediction:
    """One decode step's attention in one layer; `name` is a scheme or "fp16", which is taken as bound by its bytes."""
    _, Hkv, D = heads
    rate = 1e3 * machine.bandwidth * machine.reached  # bytes per us
    if name == "fp16":
        memory = tokens * Hkv * 4 * D / rate
        return Prediction(memory + 2 * machine.dispatch_us, memory, 0.0)
    scheme = KVScheme.parse(name)
    packed, raw = split(scheme, tokens)
    scratch = 2 * 4 * math.prod(calls(scheme, heads, tokens)[0][1]["output_shapes"][0])
    memory = (Hkv * (packed * bytes_per_key(scheme, D) + raw * 4 * D) + scratch) / rate
    chosen = machine.cycles["exchange"] if lookup == "one" else None
    coded, plain = costs(scheme, heads, tokens, by_exchange=lookup != "arithmetic")
    cycles = Hkv * (packed * coded.cycles(machine, chosen) + raw * plain.cycles(machine, chosen))
    compute = cycles / machine.cores / (1e3 * machine.ghz)
    return Prediction(max(memory, compute) + 2 * machine.dispatch_us, memory, compute)


def tokens_per_second(machine: Machine, model: Model, name: str, tokens: int, lookup: str = LOOKUPS[0]) -> float:
    """Of a whole model at a context of so many tokens: weights at the memory's rate, and attention in each layer."""
    layer = attention(machine, name, model.heads, tokens, lookup).us + OTHER_DISPATCHES * machine.dispatch_us
    return 1e6 / (model.weight_bytes / (1e3 * machine.bandwidth * machine.reached) + model.layers * layer)


def check() -> dict[str, float]:
    """Predicted over measured GPU time on an H200, which looked up by exchange, for each measured scheme and fp16."""
    heads, tokens = Heads(32, 8, 128), 131072
    return {name: attention(H200, name, heads, tokens, "one").us / us for name, us in MEASURED.items()}


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


CLASSES = {
    "FMA": ("fma",),
    "other float": ("float", "compare", "convert"),
    "integer": ("add", "address", "multiply", "bitwise", "shift", "extract"),
    "lookups": ("lookup",),
    "exchanges, votes": ("exchange", "vote"),
    "exp2": ("exp2",),
    "device loads": ("load",),
    "threadgroup": ("threadgroup_load", "threadgroup_store"),
    "barriers": ("barrier",),
}


def count_rows() -> list[list]:
    """For each scheme, D and query heads per KV head: a key's bytes, instructions by class, cycles, numbers kept."""
    out = []
    for name in (*SCHEMES, "qjl4"):
        scheme = KVScheme.parse(name)
        for D in (64, 128, 256):
            for G in (1, 4, 8):
                cost, exchange = (costs(scheme, Heads(8 * G, 8, D), 8192, way)[0] for way in (False, True))
                counts = [round(sum(cost.counts.get(kind, 0) for kind in kinds), 1) for kinds in CLASSES.values()]
                ways = (cost, None), (exchange, None), (exchange, APPLE["exchange"])
                cycles = [round(one.cycles(MACHINES[0], lookup), 1) for one, lookup in ways]
                kept = f"{cost.kept}{' *' if cost.kept > REGISTERS else ''}"
                out.append([name, D, G, round(bytes_per_key(scheme, D), 1), *counts, *cycles, kept])
    return out


def main() -> None:
    """Print the predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true")
    parser.add_argument("--heads", default="32x8x128", help="query heads x KV heads x head size")
    parser.add_argument("--tokens", default="1024,8192,32768,131072", help="1024 or more each")
    parser.add_argument("--lookup", choices=LOOKUPS, default=LOOKUPS[0])
    args = parser.parse_args()
    heads, lengths = Heads(*map(int, args.heads.split("x"))), [int(n) for n in args.tokens.split(",")]
    report = {"prediction": True, "lookup": args.lookup, "h200_predicted_over_measured": check()}
    print("Predictions; no Mac was measured. Predicted over measured on an H200, 131,072 tokens:")
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in report["h200_predicted_over_measured"].items()))
    if args.counts:
        head = ["scheme", "D", "G", "bytes", *CLASSES, *(f"cycles, {way}" for way in LOOKUPS), "kept"]
        report["counts"] = count_rows()
        print("\n## One key of one KV head, G query heads; instructions of 32 lanes, cycles of an Apple core\n")
        print(f"{table(head, report['counts'])}\n\n* more numbers in a lane than the {REGISTERS} registers it has")
    report["attention"] = []
    for machine in MACHINES:
        for tokens in lengths:
            found = {name: attention(machine, name, heads, tokens, args.lookup) for name in ("fp16", *SCHEMES)}
            cells = [f"{found['fp16'].us:.0f}"]
            for name in SCHEMES:
                bound = "instructions" if found[name].compute_us > found[name].memory_us else "bytes"
                cells.append(f"{found[name].us:.0f} ({found['fp16'].us / found[name].us:.2f}x, {bound})")
            report["attention"].append([machine.name, tokens, *cells])
    print(f"\n## One layer's attention, us ({args.heads}, lookups: {args.lookup})\n")
    print(table(["GPU", "tokens", "fp16", *SCHEMES], report["attention"]))
    report["models"] = [
        [
            *(machine.name, model.name, tokens),
            *(round(tokens_per_second(machine, model, name, tokens, args.lookup), 1) for name in ("fp16", "turbo4")),
        ]
        for machine in MACHINES
        for model in MODELS
        for tokens in lengths
    ]
    rows = table(["GPU", "model", "tokens", "fp16", "turbo4"], report["models"])
    print(f"\n## Whole models, 4-bit weights, tokens per second\n\n{rows}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

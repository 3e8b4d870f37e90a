"""Published figures of GPUs, measured times of one of them, and shapes of models, for apple_model.py.

Sources stand in docs/performance.md. No figure was measured by this project but those marked so.
"""

from typing import NamedTuple

# Cycles in which one of a core's four schedulers issues an instruction of 32 lanes. Apple: the repository
# philipturner/metal-benchmarks, "Instruction Throughputs", measured on M1, where operands of 16 bits convert for free.
# Barriers, branches and memory instructions: assumed.
APPLE = {
    **dict.fromkeys(("fma", "float", "compare", "add", "branch", "load", "store"), 1.0),
    **dict.fromkeys(("threadgroup_load", "threadgroup_store", "barrier"), 1.0),
    **{"convert": 0.0, "bitwise": 1.06, "shift": 4.01, "extract": 4.01, "multiply": 4.0, "exp2": 4.0, "address": 4.68},
    **{"exchange": 2.04, "vote": 2.02, "lookup": 32.32},
}
# NVIDIA: CUDA C++ Programming Guide, table of throughputs, compute capability 9.0: 128 results per clock are 1 cycle.
HOPPER = {
    **dict.fromkeys(("fma", "float", "branch", "load", "store", "barrier"), 1.0),
    **dict.fromkeys(("compare", "add", "bitwise", "shift", "extract", "multiply", "convert", "vote"), 2.0),
    **dict.fromkeys(("threadgroup_load", "threadgroup_store"), 1.0),
    **{"address": 4.0, "exp2": 8.0, "exchange": 4.0, "lookup": 4.0},
}
REGISTERS = 128  # of 32 bits that one lane of an Apple GPU can name; metal-benchmarks, dougallj/applegpu


class Machine(NamedTuple):
    """A GPU by published figures.

    Attributes:
        bandwidth: GB/s of its memory; `reached` is the share of it that reading reaches.
        cores: of the GPU, multiprocessors of NVIDIA's; ghz their clock.
        cycles: by kind of instruction.
        threadgroup_bytes: that a core reads from threadgroup memory in a cycle.
        dispatch_us: what one dispatch adds that waits for the one before.
    """

    name: str
    bandwidth: float
    cores: int
    ghz: float
    cycles: dict[str, float] = APPLE
    reached: float = 0.85
    threadgroup_bytes: int = 64
    dispatch_us: float = 2.0


MACHINES = (
    Machine("M1, 8 cores", 68.25, 8, 1.278),
    Machine("M3 Max, 40 cores", 400.0, 40, 1.398),
    Machine("M4 Pro, 20 cores", 273.0, 20, 1.578),
    Machine("M5, 10 cores", 153.6, 10, 1.578),
)
H200 = Machine("H200", 4800.0, 132, 1.98, HOPPER, threadgroup_bytes=128)
# GPU us of one layer's attention by the Metal text that looks codes up by exchange, one of two runs: H200, 131,072
# tokens, 32 query and 8 KV heads of 128, benchmarks/decode_attention.py --backend cuda-metal; benchmarks/LOG.md,
# 2026-11-22, when that backend had this text.
MEASURED = {"fp16": 130.3, "turbo8v4": 114.7, "turbo4": 106.2, "turbo3": 126.5, "turbo2": 103.1}


class Heads(NamedTuple):
    """Query heads, KV heads, head size."""

    H: int
    Hkv: int
    D: int


class Model(NamedTuple):
    """A decoder by its shapes; weights in 4 bits with groups of 64, so 4.5 bits each."""

    name: str
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: Heads

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that one token reads: all but the table of embeddings, of which it reads one row."""
        H, Hkv, D = self.heads
        layer = self.hidden * D * (2 * H + 2 * Hkv) + 3 * self.hidden * self.inner
        return (self.layers * layer + self.vocabulary * self.hidden) * 4.5 / 8


MODELS = (
    Model("Llama-3.1-8B", 32, 4096, 14336, 128256, Heads(32, 8, 128)),
    Model("Qwen2.5-1.5B", 28, 1536, 8960, 151936, Heads(12, 2, 128)),
    Model("Llama-3.2-1B", 16, 2048, 8192, 128256, Heads(32, 8, 64)),
)
OTHER_DISPATCHES = 15  # of a layer: 7 products, 2 norms, 2 rotations, 2 writes to the cache, activation, addition

"""The kernels of attention as one function of a step's arrays, for each shape and plan."""

from functools import lru_cache

import mlx.core as mx

from mlx_turboquant.ops.attend_plan import MAX_SPLITS, Plan, Shape
from mlx_turboquant.ops.backend import BACKENDS
from mlx_turboquant.ops.kernel import Kernel
from mlx_turboquant.tail_parts import FEW

_HEADERS = ("codebooks.h", "codes.h", "rotation.h", "storing.h")
_INPUTS = (
    *("q", "k_codes", "k_scales", "k_centers", "v_codes", "v_scales", "sink_k", "sink_v", "tail_k", "tail_v"),
    *("balance", "table", "sizes", "mask", "logits", "sketch"),
)
_ATTEND = Kernel("attend", _INPUTS, ("out",), _HEADERS)
_ATTEND_BESIDE = Kernel(
    *("attend", (*_INPUTS, "few_k", "few_v", "new_k", "new_v"), ("out", "out_few_k", "out_few_v"), _HEADERS),
    defines=("TURBOQUANT_BESIDE",),
)
_ATTEND_MMA = Kernel("attend_mma", _INPUTS, ("out",), _HEADERS, "cu")
_MERGE = Kernel("attend_merge", ("sums", "logits", "table"), ("out",), ("rotation.h", "storing.h"))


@lru_cache(maxsize=256)
def runner(shape: Shape, plan: Plan):
    """The calls as one function of the input arrays.

    It gives the result; where rows lie beside their tail, also the few keys and values with the new ones behind them.
    """
    B, H, L, D = shape[1:5]
    rows, splits = B * H * L, plan.splits + plan.raw_splits
    common = [("D", D), ("L", L), ("VB", shape.value_bits), ("LOGITS", shape.logits)]
    template = [
        *(("T", shape.dtype), ("O", shape.dtype if plan.single else mx.float32), *common),
        *(("HKV", shape.Hkv), ("G", H // shape.Hkv), ("BLOCK", shape.block), ("KB", shape.key_bits)),
        *(("KG", shape.key_groups), ("VG", shape.value_groups), ("SIGNS", shape.signs), ("CENTER", shape.center)),
        *(("BALANCE", shape.balance), ("MASK", shape.mask), ("CAUSAL", shape.causal), ("SINGLE", plan.single)),
        *(("RC", plan.rows), ("KD", plan.key_elements), ("VD", 8), ("NSG", plan.simdgroups)),
    ]
    if plan.resident:
        template.append(("RESIDENT", plan.resident))
    if plan.tensor_cores:
        # Tables of 2, 3, 4 and 8 bits have so many entries of 256 bytes; sums take the same room afterwards.
        entries = {0: 0, 2: 16, 3: 256, 4: 256, 8: 256}
        longest = max(entries[shape.key_bits], entries[shape.value_bits])
        template.append(("SHARED_BYTES", max(256 * longest, 4 * plan.simdgroups * 8 * D)))
    sums_shape, few = (rows, splits, D + 2), [(B, shape.Hkv, FEW, D)] * 2 if shape.beside else []
    kernel = _ATTEND_MMA if plan.tensor_cores else _ATTEND_BESIDE if shape.beside else _ATTEND
    attend_rows = kernel.prepare(
        shape.backend,
        template=template,
        groups=(1 if plan.single else splits, shape.Hkv * -(-(H // shape.Hkv * L) // plan.rows), B),
        threads=32 * plan.simdgroups,
        output_shapes=[(B, H, L, D) if plan.single else sums_shape, *few],
        output_dtypes=[shape.dtype if plan.single else mx.float32, *[shape.dtype] * len(few)],
    )
    # In a compiled graph MLX keeps the text and the name of a kernel; built anew at every call they take 10 us more. A
    # mask grows with every token, and a graph would be compiled for each.
    gpu = shape.backend in BACKENDS
    compiled = mx.compile if gpu and not shape.mask else lambda function: function

    loose = 4 if shape.beside else 0

    def arranged(inputs: tuple[mx.array, ...]) -> list[mx.array]:
        """As the kernel wants them: mask, sink logits and sketch where there are any, else what is not read."""
        rest = list(inputs[13 + loose :])
        out = [rest.pop(0) if wanted else inputs[11] for wanted in (shape.mask > 0, shape.logits, shape.signs)]
        if shape.signs:
            out[2] = _sketch(inputs[0], inputs[10] if shape.balance else None, out[2])
        return [*inputs[:13], *out, *inputs[13 : 13 + loose]]

    def result(out: mx.array, few: list[mx.array]):
        return (out, *few) if few else out

    if plan.single:

        def run_once(*inputs: mx.array):
            out, *few = attend_rows(arranged(inputs))
            return result(out, few)

        return compiled(run_once)
    merge = _MERGE.prepare(
        shape.backend,
        template=[("T", shape.dtype), *common, ("H", H), ("SPLITS", splits), ("RAW", plan.raw_splits), ("NSG", 8)],
        groups=(rows, 1, 1),
        threads=256,
        output_shapes=[(B, H, L, D)],
        output_dtypes=[shape.dtype],
    )

    def run(*inputs: mx.array):
        inputs = arranged(inputs)
        sums, *few = attend_rows(inputs)
        assert sums.size <= rows * MAX_SPLITS * (D + 2), "scratch is bounded"
        return result(merge([sums, inputs[14], inputs[11]])[0], few)

    return compiled(run)


def _sketch(queries: mx.array, balance: mx.array | None, projection: mx.array) -> mx.array:
    """(B, H, L, D) float32: queries as balanced keys want them, times the projection; not yet times the scale."""
    B, H, L, D = queries.shape
    x = queries.astype(mx.float32)
    if balance is not None:
        Hkv = balance.shape[1]
        x = (x.reshape(B, Hkv, H // Hkv, L, D) / balance[:, :, None, None]).reshape(B, H, L, D)
    return x @ projection.T

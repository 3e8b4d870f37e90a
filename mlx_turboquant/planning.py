"""Choose bits for each layer's keys and values: measure what each costs the model, then spend bytes where it counts.

Small perturbations of different layers add up in the divergence, so the KLD of a plan is predicted as a sum over layers
and sides. Each term is measured at 3 bits with every other layer raw; other widths scale it by what the same change
does to the whole model. The prediction only chooses; what is reported is measured, on another stretch of the text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_turboquant.evaluation import SchemeResult, evaluate
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.scheme_file import LayerSchemes
from mlx_turboquant.sizes import LayerShape, cache_nbytes

WIDTHS = (0, 8, 4, 3, 2)  # from the most bytes to the fewest; 0 is raw
PROBE = 3
RAW = KVScheme.parse("fp16")


@dataclass(frozen=True)
class Sensitivity:
    """What storing one side of one layer costs.

    Attributes:
        keys, values: (layers,) mean KLD in nats with only that layer's keys, or values, at 3 bits; None where the
            layer cannot be compressed.
        key_factor, value_factor: for each width, the KLD of the whole side at that width over that at 3 bits.
    """

    keys: list[float | None]
    values: list[float | None]
    key_factor: dict[int, float]
    value_factor: dict[int, float]

    def kld(self, plan: list[tuple[int, int] | None]) -> float:
        """The predicted KLD of (key bits, value bits) per layer."""
        total = 0.0
        for layer, bits in enumerate(plan):
            if bits is not None:
                total += self.keys[layer] * self.key_factor[bits[0]] + self.values[layer] * self.value_factor[bits[1]]
        return total


def measure(
    model: Any, ids: list[int], prompt_tokens: int, layers: list[bool], progress: Callable[[int], None]
) -> Sensitivity:
    """Measure every layer's sensitivity on a text; all tokens after the prompt are scored in one call.

    Args:
        model: an mlx-lm model.
        ids: the text.
        prompt_tokens: read raw; at least two blocks, so that most of it is encoded.
        layers: which layers can be compressed.
        progress: called with the number of tokens finished.
    """

    def one(layer: int, scheme: str) -> LayerSchemes:
        return LayerSchemes(tuple(KVScheme.parse(scheme) if i == layer else RAW for i in range(len(layers))))

    compressed = [i for i, can in enumerate(layers) if can]
    sides = [f"turbo{PROBE}v0", f"turbo0v{PROBE}"]
    uniform = [f"turbo{bits}v0" for bits in WIDTHS[1:]] + [f"turbo0v{bits}" for bits in WIDTHS[1:]]
    schemes = [one(i, side) for side in sides for i in compressed] + uniform
    results = evaluate(model, ids, schemes, prompt_tokens, len(ids), progress, keep_logits=False)
    klds = [float(result.kld.mean()) for result in results]
    n = len(compressed)
    # Any change, however small, sends a 16-bit model down another path of roundings: 1.7e-3 nats on SmolLM2 in
    # bfloat16, for one layer or for all. 8 bits change next to nothing else, so they measure it; it is taken off.
    floor = min(klds[2 * n + uniform.index(name)] for name in ("turbo8v0", "turbo0v8"))
    klds = [max(kld - floor, 1e-9) for kld in klds]
    whole = dict(zip(uniform, klds[2 * n :], strict=True))
    found, factors = [], []
    for side, name in enumerate(("turbo{}v0", "turbo0v{}")):
        single = dict(zip(compressed, klds[side * n : (side + 1) * n], strict=True))
        found.append([single.get(i) for i in range(len(layers))])
        # Divided by the sum of the single terms, so that the prediction of a uniform plan is what was measured.
        total = max(sum(single.values()), 1e-12)
        factors.append({0: 0.0, **{bits: whole[name.format(bits)] / total for bits in WIDTHS[1:]}})
    return Sensitivity(*found, *factors)


def choose(
    sensitivity: Sensitivity, shapes: list[LayerShape | None], tokens: int, budget: int | None, kld: float | None
) -> list[tuple[int, int] | None] | None:
    """Bits per layer: the least KLD within a budget of bytes, or the fewest bytes within a KLD.

    Starts raw and takes, again and again, the step to fewer bits that costs least KLD per byte saved.

    Args:
        sensitivity: from `measure`.
        shapes: per layer; None for a layer that is left alone.
        tokens: the context that the bytes are counted at.
        budget: bytes for all compressed layers, or None.
        kld: bound of the predicted KLD, used if there is no budget.

    Returns:
        (key bits, value bits) per layer, None for a layer that is left alone; None if 2 bits everywhere are too many.
    """
    plan: list[tuple[int, int] | None] = [None if shape is None else (0, 0) for shape in shapes]
    used = plan_nbytes(plan, shapes, tokens)
    while budget is None or used > budget:
        best = None
        for layer, bits in enumerate(plan):
            for side in (0, 1):
                if bits is None or bits[side] == WIDTHS[-1]:
                    continue
                # A step may skip widths: from raw straight to 4 bits can be the better bargain.
                for width in WIDTHS[WIDTHS.index(bits[side]) + 1 :]:
                    new = (width, bits[1]) if side == 0 else (bits[0], width)
                    saved = _nbytes(bits, shapes[layer], tokens) - _nbytes(new, shapes[layer], tokens)
                    if saved <= 0:
                        continue
                    factor = sensitivity.key_factor if side == 0 else sensitivity.value_factor
                    weight = (sensitivity.keys if side == 0 else sensitivity.values)[layer]
                    price = weight * (factor[width] - factor[bits[side]]) / saved
                    if best is None or price < best[0]:
                        best = price, layer, new, saved
        if best is None:
            return plan if budget is None else None
        _, layer, new, saved = best
        if budget is None and sensitivity.kld([*plan[:layer], new, *plan[layer + 1 :]]) > kld:
            return plan
        plan[layer], used = new, used - saved
    return plan


def plan_nbytes(plan: list[tuple[int, int] | None], shapes: list[LayerShape | None], tokens: int) -> int:
    """Bytes of the compressed layers of a plan at so many tokens."""
    return sum(_nbytes(bits, shape, tokens) for bits, shape in zip(plan, shapes, strict=True) if shape is not None)


def as_schemes(plan: list[tuple[int, int] | None]) -> LayerSchemes:
    """The plan as per-layer schemes, for any model with so many layers."""
    return LayerSchemes(tuple(as_scheme(bits) for bits in plan), name="plan")


def as_scheme(bits: tuple[int, int] | None) -> KVScheme:
    """The scheme of (key bits, value bits); fp16 where both are raw."""
    return RAW if bits is None or bits == (0, 0) else KVScheme("turbo", *bits)


def best_uniform(
    sensitivity: Sensitivity, shapes: list[LayerShape | None], tokens: int, budget: int
) -> tuple[int, int] | None:
    """The (key bits, value bits) that, used in every layer, fit the budget with the least predicted KLD."""
    best = None
    for key_bits in WIDTHS:
        for value_bits in WIDTHS:
            plan = [None if shape is None else (key_bits, value_bits) for shape in shapes]
            if plan_nbytes(plan, shapes, tokens) <= budget:
                kld = sensitivity.kld(plan)
                best = min(best or (kld, (key_bits, value_bits)), (kld, (key_bits, value_bits)))
    return None if best is None else best[1]


def verify(model: Any, ids: list[int], schemes: list[Any], prompt_tokens: int, progress: Any) -> list[SchemeResult]:
    """Measure schemes on a text that chose none of them, in calls of 8 tokens as decoding reads them."""
    return evaluate(model, ids, schemes, prompt_tokens, 8, progress, keep_logits=False)


def _nbytes(bits: tuple[int, int], shape: LayerShape, tokens: int) -> int:
    return cache_nbytes(as_scheme(bits), shape, tokens)

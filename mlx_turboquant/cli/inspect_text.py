"""What `inspect_file` found, in words and tables for a terminal."""

from itertools import groupby
from typing import Any

from mlx_turboquant.inspection import NormHistogram
from mlx_turboquant.inspection.prompt_caches import PARTS
from mlx_turboquant.shard import shard_in


def text(facts: dict[str, Any], by_layer: bool = False) -> str:
    """The facts of a file as lines.

    Args:
        facts: from `inspect_file`.
        by_layer: whether each layer of a prompt cache gets histograms of its own.
    """
    version = f", format {facts['format']}" if facts.get("format") is not None else ""
    first = f"{facts['file']}: {facts['kind']}{version}, {facts['file_nbytes']:,} bytes"
    kinds = {"prompt cache": _prompt_cache, "index": _index, "scheme file": _schemes, "reference logits": _logits}
    lines = kinds[facts["kind"]](facts)
    if by_layer and facts.get("norms"):
        for layer in facts["layers"]:
            lines += _norms(layer["norms"], f"layer {layer['layer']}") if layer["norms"] else []
    return "\n".join([first, *lines])


def _prompt_cache(facts: dict[str, Any]) -> list[str]:
    lines = [f"scheme: {_shown(facts['scheme'] or 'none that all layers share')}", f"model: {_model(facts['model'])}"]
    lines += [f"{_shown(key)}: {_shown(value)}" for key, value in facts["metadata"].items() if value]
    lines += [f"tokens: {facts['tokens']:,}", "", *_layers(facts)]
    return lines + (_norms(facts["norms"], "all layers") if facts["norms"] else [])


def _layers(facts: dict[str, Any]) -> list[str]:
    """A table in which neighbouring layers that agree share a line, as in `report`."""
    parts = [part for part in PARTS if part in facts["nbytes"]]
    rows = [("layer", "scheme", "tokens", *parts, "bytes", "ratio")]
    for _, same in groupby(facts["layers"], key=lambda layer: {**layer, "layer": 0, "norms": None}):
        first, *rest = same
        label = f"{first['layer']}-{rest[-1]['layer']}" if rest else str(first["layer"])
        dropped = f" (dropped {first['dropped_tokens']:,})" if first["dropped_tokens"] else ""
        sizes = [f"{first['nbytes'].get(part, 0):,}" for part in parts]
        total = f"{sum(first['nbytes'].values()):,}" + (" each" if rest else "")
        rows.append((label, first["scheme"], f"{first['tokens']:,}{dropped}", *sizes, total, _times(first["ratio"])))
    total = sum(facts["nbytes"].values())
    rows.append(
        ("all", "", "", *(f"{facts['nbytes'][part]:,}" for part in parts), f"{total:,}", _times(facts["ratio"]))
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].rjust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return [*lines, f"The same tokens at 16 bits a number: {facts['fp16_nbytes']:,} bytes."]


def _norms(sides: dict[str, Any], where: str) -> list[str]:
    lines = []
    for name, summary in sides.items():
        histogram = NormHistogram.from_summary(summary)
        lines += ["", f"norms of decoded {name}, {where}: {summary['rows']:,} rows"]
        if summary["least"] is not None:
            lines[-1] += f", {summary['least']:.4g} to {summary['most']:.4g}, mean {summary['mean']:.4g}"
        lines.append(histogram.text())
    return lines


def _index(facts: dict[str, Any]) -> list[str]:
    kept = f", kept as {facts['keep']}" if facts["keep"] else ""
    lines = [
        f"{facts['ntotal']:,} vectors of {facts['d']:,} values in {facts['bits']:g} bits, {facts['code_size']:,} bytes "
        f"a vector{kept}",
        f"metric: {facts['metric']}",
        f"seed: {facts['seed']}",
        f"next id: {facts['next_id']:,}",
        f"bytes: {', '.join(f'{name} {size:,}' for name, size in facts['nbytes'].items())}",
    ]
    return [*lines, f"The same vectors at 16 bits a number: {facts['fp16_nbytes']:,} bytes, {_times(facts['ratio'])}"]


def _schemes(facts: dict[str, Any]) -> list[str]:
    lines = [f"model: {_model(facts['model'], 'any')}", f"layers: {len(facts['layers'])}"]
    lines += [f"{_shown(key)}: {_shown(value)}" for key, value in facts["notes"].items()]
    for scheme, same in groupby(enumerate(facts["layers"]), key=lambda pair: pair[1]):
        numbers = [number for number, _ in same]
        span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        lines.append(f"{span:>9}  {scheme}")
    return lines


def _logits(facts: dict[str, Any]) -> list[str]:
    return [
        f"{facts['tokens']:,} tokens in {facts['calls']:,} calls, {facts['vocabulary']:,} logits each in "
        f"{facts['dtype']}, {facts['nbytes']:,} bytes of them",
        "Kept by mlx_turboquant.evaluate, which makes them again if they are gone.",
    ]


def _model(mark: str | None, unknown: str = "not said") -> str:
    if mark is None:
        return unknown
    shard = shard_in(mark)
    return f"fingerprint {_shown(mark)}" + (f", {shard}" if shard.size > 1 else "")


def _times(ratio: float | None) -> str:
    """How many times smaller than fp16."""
    return "" if ratio is None else f"{ratio:.2f}x"


def _shown(text: Any) -> str:
    """Text of a file on one line, without what would steer a terminal."""
    text = text if isinstance(text, str) else str(text)
    return (text if text.isprintable() else ascii(text))[:200]

"""A prompt cache's bytes and norms by layer, as a picture."""

from pathlib import Path
from typing import Any

from mlx_turboquant.inspection.prompt_caches import PARTS


def check_plot(file: str, no_norms: bool = False) -> None:
    """Say what would keep `plot` from drawing, before a large file is read.

    Raises:
        ValueError: if matplotlib is not installed, the name is no .png, the folder is missing, or norms are left out.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "[--plot] wanted matplotlib, got an environment without. Do: pip install matplotlib"
        ) from error
    path = Path(file)
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise ValueError(f"[--plot] wanted a .png in a folder that exists, got {file}. Name another.")
    if no_norms:
        raise ValueError("[--plot] wanted norms to draw, got --no-norms. Leave one of the two out.")


def plot(facts: dict[str, Any], file: str) -> None:
    """Draw stacked bytes by part, and least, mean and largest norm of keys and values, over the layers.

    Raises:
        ValueError: if the facts are not of a prompt cache.
    """
    if facts["kind"] != "prompt cache":
        raise ValueError(f"[--plot] wanted a prompt cache to draw, got {facts['file']}: {facts['kind']}. Leave it out.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (bytes_axes, *norm_axes) = pyplot.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    layers = facts["layers"]
    numbers = [layer["layer"] for layer in layers]
    base = [0] * len(layers)
    for part in (part for part in PARTS if part in facts["nbytes"]):
        sizes = [layer["nbytes"].get(part, 0) for layer in layers]
        bytes_axes.bar(numbers, sizes, bottom=base, label=part)
        base = [below + size for below, size in zip(base, sizes, strict=True)]
    bytes_axes.set(ylabel="bytes", title=f"{Path(facts['file']).name}: {facts['tokens']:,} tokens")
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    bytes_axes.legend(**beside)
    for axes, side in zip(norm_axes, ("keys", "values"), strict=True):
        told = [(layer["layer"], layer["norms"][side]) for layer in layers if layer["norms"]]
        told = [(number, norms) for number, norms in told if norms["least"] is not None]
        where = [number for number, _ in told]
        for name, marker in (("most", "^"), ("mean", "o"), ("least", "v")):
            axes.plot(where, [norms[name] for _, norms in told], marker, label=name)
        axes.set(ylabel=f"norm of decoded {side}")
        axes.grid(alpha=0.3)
        if told:
            axes.set_ylim(bottom=0)
            axes.legend(**beside)
    norm_axes[-1].set(xlabel="layer")
    norm_axes[-1].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)

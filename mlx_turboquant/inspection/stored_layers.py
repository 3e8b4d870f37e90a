"""The layers of a prompt-cache file, one at a time: the next is read only when it is asked for."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.models import cache as mlx_lm_cache

from mlx_turboquant.prompt_cache_file import _check_file as check_file

_FROM_ARRAY = {
    "scalar": lambda array: array.item(),
    "string": lambda array: "".join(map(chr, array.tolist())),
    "none": lambda array: None,
}


class StoredLayers:
    """A prompt-cache file whose arrays MLX has not read yet.

    Iterating gives each layer's cache once; what it holds is read when it is evaluated, and released with it.

    Args:
        path: of the file.

    Attributes:
        metadata: the text that was stored with the cache.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no prompt cache that `load_prompt_cache` would load.
    """

    def __init__(self, path: Path):
        check_file(path)
        self._path = path
        try:
            arrays, flat = mx.load(str(path), return_metadata=True)
            parts = tree_unflatten(list(flat.items()))
            self.metadata, self._classes, kinds = dict(parts[0] or {}), parts[1], parts[2]
            self._kinds = dict(kinds[1:])  # name of an array -> what it stands for
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._error(error) from error
        self._arrays: dict[int, dict[str, mx.array]] = defaultdict(dict)
        for name, array in arrays.items():
            layer, _, rest = name.partition(".")
            self._arrays[int(layer)][rest] = array

    def __iter__(self) -> Iterator[Any]:
        for layer, kind in enumerate(self._classes):
            arrays: dict[str, Any] = self._arrays.pop(layer, {})
            try:
                for name in arrays:
                    stands_for = self._kinds.get(f"{layer}.{name}")
                    if stands_for is not None:
                        arrays[name] = _FROM_ARRAY[stands_for](arrays[name])
                cache = getattr(mlx_lm_cache, kind).from_state(tree_unflatten(list(arrays.items())))
            except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
                raise self._error(error, f" of layer {layer}") from error
            del arrays
            yield cache

    def _error(self, error: Exception, what: str = "") -> ValueError:
        return ValueError(
            f"[inspect] wanted the state{what} as save_prompt_cache writes it, got another in {self._path} ({error}). "
            "Save the prompt again."
        )

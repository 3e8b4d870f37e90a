"""Vector search on TurboQuant codes: nothing is trained, vectors can be added and removed at any time."""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_turboquant.index import doors, exact, file, kept
from mlx_turboquant.index.blocks import Blocks
from mlx_turboquant.index.codec import IndexCodec
from mlx_turboquant.index.ids import Ids
from mlx_turboquant.index.incoming import encoded
from mlx_turboquant.index.search import distances, search
from mlx_turboquant.index.settings import Settings, row_bytes, whole_number
from mlx_turboquant.index.top import MAX_ROWS
from mlx_turboquant.vectors.rows import chunk_slices, chunks


class TurboQuantIndex:
    """An index of vectors in 1 to 8 bits per number, searched by comparing queries with all of them.

    A vector becomes codes and one scale, chosen so that an estimated inner product is right on average over the random
    rotation (`codec.IndexCodec` has the mathematics and the sources). Conventions are those of Faiss: rows in, best
    first out, ids as int64.

    Args:
        d: length of a vector, up to 65536 with an odd factor up to 4096.
        bits: per number: 1, 2, 2.5, 3, 3.5, 4 or 8.
        metric: "ip" (inner product), "cosine" (vectors and queries are normalised) or "l2" (squared distance).
        seed: of the rotation, at least 0. Equal seeds give equal codes, but for numbers within a rounding error of a
            cell's end.
        keep: "float16" or "int8" keeps the vectors too, with one scale each, so that `search` can score the best again
            (`rerank`). They are read from memory or a mapped file for those few only.

    Attributes:
        d, bits, metric, seed, keep: as given.

    Raises:
        ValueError: for other settings.

    Example:
        >>> import numpy as np
        >>> from mlx_turboquant.index import TurboQuantIndex
        >>> x = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
        >>> index = TurboQuantIndex(d=64, bits=4, metric="cosine")
        >>> index.add(x)
        >>> scores, ids = index.search(x[[7, 11]], k=3)
        >>> ids[:, 0].tolist(), ids.shape, index.ntotal, index.code_size
        ([7, 11], (2, 3), 1000, 36)
    """

    def __init__(self, d: int, bits: float = 4, metric: str = "ip", seed: int = 0, keep: str | None = None):
        self._settings = Settings(d, bits, metric, seed, keep)
        self._codec = IndexCodec(self._settings)
        self._blocks = Blocks(self._settings)
        self._ids = Ids(self._blocks)

    d: int = property(lambda self: self._settings.d)
    bits: float = property(lambda self: self._settings.bits)
    metric: str = property(lambda self: self._settings.metric)
    seed: int = property(lambda self: self._settings.seed)
    keep: str | None = property(lambda self: self._settings.keep)

    def __repr__(self) -> str:
        s = self._settings
        settings = f"d={s.d}, bits={s.bits}, metric={s.metric!r}, seed={s.seed}, keep={s.keep!r}"
        return f"TurboQuantIndex({settings}): {self.ntotal} vectors"

    @property
    def ntotal(self) -> int:
        """How many vectors the index holds."""
        return self._blocks.count

    @property
    def ids(self) -> np.ndarray:
        """The ids (ntotal,) int64 in the order of insertion."""
        return np.concatenate([np.zeros(0, np.int64), *self._blocks.pieces("ids")])

    @property
    def code_size(self) -> int:
        """Bytes per vector that a search reads: codes, scale and, for l2, norm.

        In memory and in a file an id takes 8 more, as in Faiss's IndexIDMap.
        """
        return row_bytes(self._settings.searched)

    @property
    def kept_size(self) -> int:
        """Bytes per vector for `keep`, scale included; 0 without."""
        return row_bytes(self._settings.kept)

    def add(self, x: mx.array | np.ndarray, ids: Any = None) -> None:
        """Add vectors; all of them, or after an error none.

        Args:
            x: (n, d), or one vector (d,); numpy or mlx, any float dtype, computed in float32. Zero vectors are taken;
                their inner products are 0.
            ids: (n,) whole numbers from 0 to 2**63 - 1, which no vector of the index has; without, they count on from
                the largest that the index ever had, from 0 at first.

        Raises:
            ValueError: for another shape or dtype, NaN or infinite numbers (with the first positions), a vector longer
                than 1e18 (but for cosine), or ids that are taken, given twice or negative.
        """
        where = "TurboQuantIndex.add"
        x = doors.as_rows(where, x, self.d)
        n, start = len(x), self._blocks.total
        asked = None if ids is None else doors.different(where, doors.as_ids(where, ids, n))
        if not n:
            return
        ids = self._ids.new(where, n, asked)
        if start + n > MAX_ROWS:
            raise ValueError(f"[{where}] wanted at most {MAX_ROWS} rows, got {start + n}. Use several indexes.")
        try:
            for part, arrays in encoded(where, self._codec, x):
                columns = {name: arrays[name] for name in self._settings.searched} | {"ids": ids[part]}
                columns |= kept.keep(self._settings, arrays["prepared"]) if self.keep else {}
                self._blocks.append(columns, n - part.stop)
        except BaseException:
            self._blocks.truncate(start)
            raise
        self._ids.came(ids, start)

    def search(
        self, q: mx.array | np.ndarray, k: int, filter: Any = None, rerank: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest vectors of each query, best first; of equally near ones those that were added first.

        Memory beside the index is bounded whatever its size: see `search.search`.

        Args:
            q: (m, d), or one query (d,), as the vectors of `add`.
            k: at least 1.
            filter: only these are found: ids (n,), or a mask (ntotal,) bool in the order of `ids`.
            rerank: score this many of the best by codes (at least k) again with the kept vectors.

        Returns:
            D (m, k) float32: inner products, cosines or squared distances (estimates, which may lie a little outside
            of what is possible, but are not negative for l2); I (m, k) int64: ids. Where there are fewer than k
            vectors, I is -1 and D -inf, for l2 inf.

        Raises:
            ValueError: as `add` for the queries; for k below 1, a filter of unknown ids or of another shape, or rerank
                in an index without kept vectors.
        """
        return distances(self.metric, *self.scored("TurboQuantIndex.search", q, k, filter, rerank))

    def scored(
        self, where: str, q: mx.array | np.ndarray, k: int, filter: Any, rerank: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `search` finds before `search.distances`: scores (m, k), ids (m, k), offsets (m, 1)."""
        k, rerank = whole_number(where, "k", k, 1), whole_number(where, "rerank", rerank, 0)
        if rerank and not self.keep:
            raise ValueError(
                f"[{where}] wanted rerank=0, as this index keeps no vectors, got {rerank}. Make it with "
                "keep='float16' or keep='int8'."
            )
        q = doors.as_rows(where, q, self.d)
        wanted = self._wanted(where, filter)
        if not len(q):
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64), np.zeros((0, 1))
        parts = [self._codec.prepare(where, rows) for rows in chunks(where, q)]
        rotated = mx.concatenate([self._codec.rotate(part) for part in parts])
        prepared = np.concatenate([np.array(part) for part in parts])
        offsets = np.square(prepared, dtype=np.float64).sum(axis=1, keepdims=True)
        scores, rows = search(self._blocks, self._codec, rotated, max(k, min(rerank, self.ntotal)), wanted)
        if rerank:
            scores, rows = kept.rescore(self._gather_kept, self.metric, prepared, rows, k)
            offsets = np.zeros_like(offsets)
        ids = self._blocks.gather(["ids"], np.maximum(rows, 0).reshape(-1))["ids"].reshape(rows.shape)
        return scores, np.where(rows < 0, -1, ids), offsets

    def reconstruct(self, ids: Any) -> np.ndarray:
        """The vectors (n, d) float32 that codes and scales stand for, so that <q, x> is estimated by their product.

        They are longer than the vectors by 1 / cosine, which makes the products right on average; for cosine they
        stand for the normalised vectors.

        Args:
            ids: (n,) whole numbers.

        Raises:
            ValueError: for ids that are not in the index.
        """
        rows = self._ids.rows("TurboQuantIndex.reconstruct", doors.as_ids("TurboQuantIndex.reconstruct", ids))
        out = np.empty((len(rows), self.d), np.float32)
        for part in chunk_slices("TurboQuantIndex.reconstruct", len(rows), self.d) if len(rows) else []:
            arrays = self._blocks.gather(list(self._settings.searched), rows[part])
            out[part] = np.array(self._codec.decode(arrays))
        return out

    def remove_ids(self, ids: Any) -> int:
        """Remove vectors and say how many; an id that was removed may be given to another vector.

        Removed rows are marked, and their memory is given back when they are more than the rest. Rows of a loaded file
        are only marked; `save` leaves out what is removed.

        Args:
            ids: (n,) different whole numbers.

        Raises:
            ValueError: for ids that are not in the index, which then stays as it is.
        """
        where = "TurboQuantIndex.remove_ids"
        rows = self._ids.rows(where, doors.different(where, doors.as_ids(where, ids)))
        if len(rows) and self._blocks.remove(rows):
            self._ids.renumbered()
        return len(rows)

    def recall_at_k(self, q: mx.array | np.ndarray, x: mx.array | np.ndarray, k: int) -> float:
        """The share of queries whose nearest neighbour among x, by exact search, is among the first k found.

        Args:
            q: queries (m, d), m at least 1.
            x: (ntotal, d), the vectors of the index in the order of `ids`.
            k: at least 1.

        Raises:
            ValueError: as `search`, for another number of vectors, or for no queries.
        """
        where = "TurboQuantIndex.recall_at_k"
        q, x = doors.as_rows(where, q, self.d), doors.as_rows(where, x, self.d)
        if len(x) != self.ntotal or not len(q) or not len(x):
            raise ValueError(
                f"[{where}] wanted at least one query and the {self.ntotal} vectors of the index, got {len(q)} and "
                f"{len(x)}. Pass x in the order of ids."
            )
        nearest = exact.nearest(where, self._codec, q, x)
        found = self.search(q, k)[1]
        return float((found == self.ids[nearest][:, None]).any(axis=1).mean())

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to a file, whole or not at all, a few megabytes at a time.

        The file is in the safetensors layout (`file` describes it). Removed vectors are left out.

        Args:
            path: may be the file that this index was loaded from.

        Raises:
            OSError: if it cannot be written; an older file of this name is then untouched.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"[TurboQuantIndex.save] There is no folder {path.parent}.")
        file.save(path, self._settings, self.ntotal, self._ids.next_id, self._blocks.pieces)

    @classmethod
    def load(cls, path: str | os.PathLike, memory_map: bool = True) -> "TurboQuantIndex":
        """An index from a file of `save`, at once: its arrays are read when a search needs them.

        Vectors can be added (those are in memory) and removed (marked in memory); the file does not change.

        Args:
            path: the file. It must not be cut short while the index is in use.
            memory_map: False reads all into memory, where searches need not copy it to a device again.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is cut short, damaged, of another version, or no index.
        """
        settings, next_id, arrays = file.load(Path(path))
        index = cls(settings.d, settings.bits, settings.metric, settings.seed, settings.keep)
        index._ids.next_id = next_id
        if memory_map:
            index._blocks.attach(arrays)
        else:
            index._blocks.append(arrays)
        return index

    def _wanted(self, where: str, filter: Any) -> np.ndarray:
        living = self._blocks.living
        if filter is None:
            return living
        filter = doors.as_filter(where, filter, self.ntotal)
        wanted = np.zeros(len(living), bool)
        if filter.dtype == bool:
            wanted[living] = filter
        else:
            wanted[self._ids.rows(where, filter)] = True
        return wanted

    def _gather_kept(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._blocks.gather(list(self._settings.kept), rows)

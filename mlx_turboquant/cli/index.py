"""``mlx_turboquant.index``: an index of vectors in 1 to 8 bits a value.

    build vectors.npy vectors.tqi --bits 4 --metric cosine --keep float16
    search vectors.tqi queries.npy -k 10 --output results.npz --rerank 100
    info vectors.tqi

Vectors and queries are .npy matrices of any float dtype or .fvecs files; both
are read piece by piece, never whole.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.cli.vector_files import open_vectors, open_whole_numbers
from mlx_turboquant.files import written_whole
from mlx_turboquant.index import TurboQuantIndex

WIDTHS = (1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 8.0)
# Values of vectors handed over at a time: 64 MiB as float32, so that the bar moves and memory stays bounded.
CHUNK_VALUES = 1 << 24
CHUNK_QUERIES = 1024
SHOWN_QUERIES, SHOWN_NEIGHBOURS = 10, 5


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    out = argparse.ArgumentParser(
        prog="mlx_turboquant.index",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = out.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build", help="write an index of the vectors of a file", description="Write an index of the vectors of a file."
    )
    build.add_argument("vectors", help=".npy or .fvecs")
    build.add_argument("index", help="file to write")
    build.add_argument("--bits", type=float, choices=WIDTHS, default=4, metavar="BITS",
                       help="bits for a value: 1, 2, 2.5, 3, 3.5, 4 or 8 (4)")  # fmt: skip
    build.add_argument("--metric", choices=("ip", "cosine", "l2"), default="ip", help="what is near (ip)")
    build.add_argument("--keep", choices=("float16", "int8"), help="keep the vectors beside the codes, for --rerank")
    build.add_argument("--ids", help=".npy or .ivecs of the vectors' ids (0, 1, ...)")
    build.add_argument("--seed", type=int, default=0, help="of the random rotation (0)")
    search = commands.add_parser("search", help="find the nearest vectors", description="Find the nearest vectors.")
    search.add_argument("index", help="file written by build")
    search.add_argument("queries", help=".npy or .fvecs")
    search.add_argument("-k", type=int, default=10, help="how many for each query (10)")
    search.add_argument("--rerank", type=int, default=0, help="score so many again with the kept vectors (0: none)")
    search.add_argument("--truth", help=".npy or .ivecs of the true nearest ids, nearest first: prints the recall")
    search.add_argument("--output", metavar="FILE.npz", help="write D (scores) and I (ids) instead of showing some")
    info = commands.add_parser("info", help="tell what an index holds", description="Tell what an index holds.")
    info.add_argument("index", help="file written by build")
    info.add_argument("--json", action="store_true", help="as one line of JSON")
    return out


def main() -> None:
    """Run the command's part that the first argument names."""
    with one_line_errors("mlx_turboquant.index"):
        args = parser().parse_args()
        {"build": _build, "search": _search, "info": _info}[args.command](args)


def _build(args: argparse.Namespace) -> None:
    x = open_vectors(args.vectors)
    ids = _ids(args.ids, len(x)) if args.ids else None
    _writable(args.index, args.vectors, args.ids)
    index = TurboQuantIndex(x.shape[1], bits=args.bits, metric=args.metric, seed=args.seed, keep=args.keep)
    start = time.perf_counter()
    for part in _chunks(len(x), max(CHUNK_VALUES // max(x.shape[1], 1), 1), "vec"):
        rows = np.asarray(x[part])
        _finite(args.vectors, rows, part.start)
        index.add(rows, None if ids is None else np.asarray(ids[part]))
    encoded = time.perf_counter()
    index.save(args.index)
    print(f"{index.ntotal:,} vectors encoded in {encoded - start:.1f} s\n{_text(args.index, index)}")


def _search(args: argparse.Namespace) -> None:
    index = TurboQuantIndex.load(args.index)
    q = open_vectors(args.queries)
    truth = _truth(args.truth, len(q)) if args.truth else None
    if args.output:
        if Path(args.output).suffix != ".npz":
            raise ValueError(f"[--output] wanted a file that ends with .npz, got {args.output}.")
        _writable(args.output, args.index, args.queries, args.truth)
    if q.shape[1] != index.d:
        raise ValueError(
            f"[{args.queries}] wanted queries of {index.d} values as {args.index} has, got {q.shape[1]}. "
            "Take queries of the same model."
        )
    if args.k < 1:  # or a file without queries would hide it
        raise ValueError(f"[-k] must be at least 1, got {args.k}.")
    D, I = np.empty((len(q), args.k), np.float32), np.empty((len(q), args.k), np.int64)
    start = time.perf_counter()
    for part in _chunks(len(q), CHUNK_QUERIES, "query"):
        rows = np.asarray(q[part])
        _finite(args.queries, rows, part.start)
        D[part], I[part] = index.search(rows, args.k, rerank=args.rerank)
    seconds = time.perf_counter() - start
    if args.output:
        with written_whole(Path(args.output)) as aside, open(aside, "wb") as file:
            np.savez(file, D=D, I=I)
    else:
        print(_table(D, I))
    print(f"{len(q):,} queries in {seconds:.2f} s")
    if truth is not None:
        print(_recall(I, truth))


def _info(args: argparse.Namespace) -> None:
    index = TurboQuantIndex.load(args.index)
    print(json.dumps(_facts(args.index, index)) if args.json else _text(args.index, index))


def _facts(path: str, index: TurboQuantIndex) -> dict[str, Any]:
    return {
        "ntotal": index.ntotal,
        "d": index.d,
        "bits": index.bits,
        "metric": index.metric,
        "keep": index.keep,
        "seed": index.seed,
        "code_size": index.code_size,
        "kept_size": index.kept_size,
        "file_size": Path(path).stat().st_size,
    }


def _text(path: str, index: TurboQuantIndex) -> str:
    facts = _facts(path, index)
    kept = f", and {facts['kept_size']:,} bytes as {facts['keep']}" if facts["keep"] else ""
    return (
        f"{path}: {facts['ntotal']:,} vectors of {facts['d']:,} values, metric {facts['metric']}, "
        f"seed {facts['seed']}\n"
        f"{facts['bits']:g} bits a value: {facts['code_size']:,} bytes a vector{kept}, without its id; "
        f"{4 * facts['d'] / facts['code_size']:.1f} times fewer than float32\nfile: {facts['file_size']:,} bytes"
    )


def _chunks(n: int, step: int, unit: str) -> Iterator[slice]:
    """Slices of n rows, with a bar on stderr if that is a terminal."""
    with tqdm(total=n, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            yield part
            bar.update(part.stop - start)


def _finite(path: str, rows: np.ndarray, start: int) -> None:
    """The index checks this too, but it does not know at which row of the file a piece starts."""
    bad = start + np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        named = ", ".join(map(str, bad[:5])) + (", ..." if bad.size > 5 else "")
        raise ValueError(f"[{path}] wanted finite numbers, got NaN or infinity in rows {named}. Leave those rows out.")


def _ids(path: str, n: int) -> np.ndarray:
    ids = open_whole_numbers(path)
    if ids.shape != (n,):
        raise ValueError(f"[--ids] wanted {n:,} ids, one for each vector, got {ids.shape} in {path}.")
    return ids


def _truth(path: str, m: int) -> np.ndarray:
    truth = open_whole_numbers(path)
    truth = truth[:, None] if truth.ndim == 1 else truth
    if len(truth) != m or not truth.shape[1]:
        raise ValueError(f"[--truth] wanted ids for {m:,} queries, got {truth.shape} in {path}.")
    return truth


def _writable(path: str, *read: str | None) -> None:
    """Said before the work: the folder is there and no file that is read would be replaced."""
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise ValueError(f"[{path}] There is no folder {target.parent}. Make it first.")
    if target.is_dir():
        raise ValueError(f"[{path}] is a folder. Name a file to write.")
    for other in filter(None, read):
        if target.exists() and target.samefile(other):
            raise ValueError(f"[{path}] is read by this command and would be replaced. Name another file.")


def _table(D: np.ndarray, I: np.ndarray) -> str:
    """The first neighbours of the first queries: ids, and scores or squared distances in brackets."""
    lines = []
    for row, (scores, ids) in enumerate(zip(D[:SHOWN_QUERIES], I[:SHOWN_QUERIES], strict=True)):
        pairs = zip(scores[:SHOWN_NEIGHBOURS], ids[:SHOWN_NEIGHBOURS], strict=True)
        found = [f"{i} ({score:.4g})" for score, i in pairs if i >= 0]
        lines.append(f"query {row}: {', '.join(found) or 'nothing'}")
    if len(I) > SHOWN_QUERIES or I.shape[1] > SHOWN_NEIGHBOURS:
        lines.append("... --output FILE.npz writes them all.")
    return "\n".join(lines)


def _recall(I: np.ndarray, truth: np.ndarray) -> str:
    """How many queries' true nearest id is among the first 1, 2, 4, ... found."""
    counts = sorted({*(1 << np.arange(I.shape[1].bit_length())).tolist(), I.shape[1]})
    found = [(I[:, :k] == truth[:, :1]).any(axis=1).mean() if len(I) else float("nan") for k in counts]
    return "recall of the true nearest: " + ", ".join(f"1@{k} {r:.4f}" for k, r in zip(counts, found, strict=True))


if __name__ == "__main__":
    main()

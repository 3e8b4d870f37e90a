"""Vector search at equal bytes: TurboQuantIndex against faiss's PQ, RaBitQ, EDEN and scalar quantizer, in one run.

    pip install faiss-cpu
    python benchmarks/embeddings.py minilm.npy
    python benchmarks/index.py minilm.npy 200x100000 1536x50000 [--bits 1,2,3,4,8] [--against pq,rabitq,eden,sq]
                               [--queries 1000] [--threads 1] [--plot FILE.png]
    python benchmarks/index.py --from-json FILE --plot FILE.png          draws what an earlier run printed

A data set is a .npy file, whose last rows become the queries, or DxN: N random unit vectors of D values. Rows are
brought to unit length and searched by inner product. Truth is an exact search in float32.

Bytes are those that an index keeps for each vector: codes, scales and factors; ids are left out on both sides, as faiss
numbers its vectors without storing anything. What is kept once for all vectors is not counted: PQ's centroids, faiss's
rotation matrix and centre; TurboQuantIndex has signs made from a seed. faiss always gets as many bytes as ours or more:
PQ has a byte for each of as many pieces of a vector as ours has bytes (pieces as equal as can be, the shorter ones
padded with a zero, so that the last byte too is of use); RaBitQ and EDEN have the same bits for a value and more for
factors. Only the scalar quantizer of 4 bits has fewer, by our scale: it keeps a range for each coordinate and no factor
for a vector. RaBitQ and EDEN get a random rotation and centre the data; RaBitQ reads queries in 8 bits. All settings
else are faiss's defaults.

recall@1: the true nearest neighbour comes first. recall@10: share of the 10 true nearest among the first 10.
recall@1@k: the true nearest is among the first k. Indexing seconds are training and encoding; ours are the median of
three. Queries per second: all queries in one call, first 16 found. Beside the clock's seconds stand those of all
threads on the CPU, which other programs on the machine change little; on a GPU they say nothing. faiss runs on
--threads cores, without it on all; ours on a CPU on one, but for numpy's products of matrices, which take all. For one
core set OMP_NUM_THREADS=1 too.
Prints a card, a table and one line of JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlx_turboquant.cli.evaluate import card
from mlx_turboquant.index import TurboQuantIndex

KS = (1, 2, 4, 8, 16)
ENGINES = ("pq", "rabitq", "eden", "sq")
COLORS = {"turboquant": "tab:red", "pq": "tab:blue", "rabitq": "tab:green", "eden": "tab:orange", "sq": "tab:gray"}


def data_set(name: str, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """(vectors (n, d), queries (m, d)), float32 unit rows.

    Raises:
        SystemExit: for a file without a row more than the queries.
    """
    if name.endswith(".npy"):
        rows = np.load(name).astype(np.float32)
        if rows.ndim != 2 or len(rows) <= queries:
            sys.exit(f"[index] {name} must hold more than {queries} rows, got the shape {rows.shape}.")
    else:
        d, n = map(int, name.split("x"))
        rows = np.random.default_rng(d).standard_normal((n + queries, d), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:-queries], rows[-queries:]


def nearest(x: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    """(m, k) rows of x with the largest inner products, best first."""
    found = []
    for part in np.array_split(q, -(-len(q) // 256)):
        products = part @ x.T
        best = np.argpartition(-products, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(products, best, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(best, order, axis=1))
    return np.concatenate(found)


def in_pieces(x: np.ndarray, pieces: int) -> np.ndarray:
    """Columns cut into so many pieces as equal as can be, each filled with zeros to the longest one's length."""
    d = x.shape[1]
    length = -(-d // pieces)
    out = np.zeros((len(x), pieces * length), np.float32)
    starts = np.linspace(0, d, pieces + 1).round().astype(int)
    for piece, (start, stop) in enumerate(pairwise(starts)):
        out[:, piece * length : piece * length + stop - start] = x[:, start:stop]
    return out


def faiss_index(engine: str, bits: int, d: int, nbytes: int) -> tuple[Any, int, Callable[[np.ndarray], np.ndarray]]:
    """(untrained index, bytes for each vector, what to do to rows before)."""
    import faiss

    ip = faiss.METRIC_INNER_PRODUCT
    if engine == "pq":
        width = nbytes * -(-d // nbytes)
        return faiss.IndexPQ(width, nbytes, 8, ip), nbytes, lambda x: in_pieces(x, nbytes)
    if engine == "sq":
        index = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_4bit, ip)
        return index, index.code_size, lambda x: x
    codes = faiss.IndexEDEN(d, ip, bits) if engine == "eden" else faiss.IndexRaBitQ(d, ip, bits)
    if engine == "rabitq":
        codes.qb = 8
    rotation = faiss.RandomRotationMatrix(d, d)
    rotation.init(1)
    index = faiss.IndexPreTransform(rotation, codes)
    return index, codes.code_size, lambda x: x


def clocks() -> np.ndarray:
    """Seconds of the clock, and of all this process's threads on the CPU."""
    return np.array([time.perf_counter(), time.process_time()])


def run_faiss(engine: str, bits: int, nbytes: int, x: np.ndarray, q: np.ndarray) -> dict[str, Any]:
    """What one faiss index finds, its bytes and seconds."""
    index, size, prepare = faiss_index(engine, bits, x.shape[1], nbytes)
    rows, asked = prepare(x), prepare(q)
    # faiss 1.15.1 takes 2.2 s to train a piece of 2 values on 50,000 rows and 0.2 s on 65,000 or more, so PQ gets its
    # rows again up to the 65,536 that it would take of a larger set: the centroids are as good.
    sample = np.resize(rows, (max(len(rows), 65536), rows.shape[1])) if engine == "pq" else rows
    start = clocks()
    index.train(sample)
    index.add(rows)
    added = clocks()
    found = index.search(asked, max(KS))[1]
    return {"found": found, "bytes": size, "indexing": added - start, "search": clocks() - added}


def run_ours(bits: float, x: np.ndarray, q: np.ndarray) -> dict[str, Any]:
    """What TurboQuantIndex finds, its bytes and seconds."""
    seconds = []
    for _ in range(3):
        index = TurboQuantIndex(x.shape[1], bits=bits, metric="ip")
        start = clocks()
        index.add(x)
        seconds.append(clocks() - start)
    index.search(q, max(KS))  # compiles kernels
    start = clocks()
    found = index.search(q, max(KS))[1]
    took = clocks() - start
    return {"found": found, "bytes": index.code_size, "indexing": np.median(seconds, axis=0), "search": took}


def judged(result: dict[str, Any], truth: np.ndarray) -> dict[str, Any]:
    """A result with its recalls in place of what was found, and plain numbers."""
    found, m = result["found"], len(truth)
    among = found[:, :, None] == truth[:, None, :]
    curve = {k: float(among[:, :k, 0].any(axis=1).mean()) for k in KS}
    (index_s, index_cpu_s), (search_s, search_cpu_s) = result["indexing"].tolist(), result["search"].tolist()
    return {
        "bytes": result["bytes"],
        "recall@10": float(among[:, :10].sum() / (10 * m)),
        "recall@1@k": curve,
        "indexing_s": index_s,
        "indexing_cpu_s": index_cpu_s,
        "queries_per_s": m / search_s,
        "queries_per_cpu_s": m / search_cpu_s,
    }


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [result["data"], result["engine"], f"{result['bits']:g}", f"{result['bytes']:,}"]
    cells += [f"{result['recall@10']:.3f}", *(f"{result['recall@1@k'][k]:.3f}" for k in KS)]
    cells += [f"{result[name]:.2f}" for name in ("indexing_s", "indexing_cpu_s")]
    cells += [f"{result[name]:,.0f}" for name in ("queries_per_s", "queries_per_cpu_s")]
    return f"| {' | '.join(cells)} |"


def compare(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All results on one data set, each printed as soon as it is there."""
    x, q = data_set(name, args.queries)
    truth = nearest(x, q, 10)
    label = f"{Path(name).stem if name.endswith('.npy') else 'random'} {x.shape[1]} x {len(x):,}"
    results = []

    def came(engine: str, bits: float, result: dict[str, Any]) -> None:
        results.append({"data": label, "engine": engine, "bits": bits, **judged(result, truth)})
        print(row(results[-1]), flush=True)

    for bits in args.bits:
        ours = run_ours(bits, x, q)
        came("turboquant", bits, ours)
        for engine in args.against:
            if int(bits) == bits and (engine != "sq" or bits == 4):
                came(engine, bits, run_faiss(engine, int(bits), ours["bytes"], x, q))
    return results


def plot(results: list[dict[str, Any]], file: str) -> None:
    """Recall@1@k against k, a panel for each data set: the figure of arXiv 2504.19874, section 4.4."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result["data"] for result in results))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4.4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for result in results:
            if result["data"] == name and result["bits"] in (2, 4):
                line = "-" if result["bits"] == 4 else "--"
                heights = [result["recall@1@k"][str(k)] for k in KS]
                label = f"{result['engine']} {result['bits']:g} bits, {result['bytes']:,} B"
                axis.plot(KS, heights, line, marker="o", markersize=3, color=COLORS[result["engine"]], label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(KS, KS)
        axis.set(title=name, xlabel="k", ylabel="recall@1@k")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    print(f"wrote {file}", file=sys.stderr)  # the last line of stdout is JSON


def main() -> None:
    """Compare and print, or draw."""

    def bits(text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--bits", type=bits, default=[2, 4])
    parser.add_argument("--against", type=lambda text: [e for e in text.split(",") if e], default=list(ENGINES))
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--from-json")
    parser.add_argument("--plot")
    args = parser.parse_args()
    if unknown := set(args.against) - set(ENGINES):
        parser.error(f"--against knows {', '.join(ENGINES)}, got {', '.join(sorted(unknown))}")
    if args.from_json:
        results = json.loads(Path(args.from_json).read_text().splitlines()[-1])["results"]
    else:
        if not args.data:
            parser.error("name at least one data set: a .npy file or DxN")
        import faiss

        faiss.omp_set_num_threads(args.threads)
        where = f"faiss {faiss.__version__} on {args.threads} of {os.cpu_count()} cores"
        print(card("", f"vector search, {args.queries} queries, {where}"))
        columns = ["data", "index", "bits", "bytes", "recall@10", *(f"1@{k}" for k in KS)]
        columns += ["indexing s", "on the CPU", "queries/s", "per CPU s"]
        print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|", flush=True)
        line = json.dumps({"results": [result for name in args.data for result in compare(name, args)]})
        print(line)
        results = json.loads(line)["results"]
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()

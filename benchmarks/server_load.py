"""The server under load: concurrent conversations against the same ones alone, prefix hits, and memory over time.

    python benchmarks/server_load.py [--model MODEL] [--kv-scheme turbo4] [--clients 8] [--turns 4] [--requests 200]
                                     [--max-tokens 16] [--dtype float32]
    python benchmarks/server_load.py --minutes 20 --clients 32 [--tiny] [--kv-memory-limit 64MB] [--kv-queue-seconds 5]

Starts `mlx_turboquant.server` twice, as a process of its own. The first answers the first conversation of every client,
one after the other; the second serves all clients at once, as many conversations as make up the requests. The first
server's answers are compared with the second's. Without --model it is SmolLM2-135M (`pip install ".[demo]"`). Float32
by default, since 16 bits round differently for another size of batch. Prints a table, then one line of JSON; exits with
1 if an answer differs or a later turn found no prefix.

With --minutes the clients ask for so long: conversations of mixed lengths, of which a few are cancelled amid their
stream, and requests that are wrong on purpose (`server_soak.py`). It exits with 1 if an answer is wrong or lost, an
error is answered wrongly, something still runs at the end, the KV bytes exceed their limit, or memory grows with the
requests. --tiny takes a random model of 2 layers instead of SmolLM2, for machines where that is too slow.
"""

import argparse
import contextlib
import http.client
import json
import os
import pydoc_data.topics
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import server_soak
from mlx.utils import tree_flatten

from mlx_turboquant.cli.evaluate import card, expand, load_model

QUESTIONS = ("What is this text about?", "Name one word of it.", "Say that in other words.", "Is there an example?")


class Server:
    """One running server and how to ask it."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, path: str, body: dict | None = None) -> dict:
        """The decoded answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            answer = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"{path} was answered with {response.status}: {answer}")
        return answer


@contextlib.contextmanager
def serving(model: Path | str, scheme: str, clients: int, *more: object) -> Iterator[Server]:
    """A server process with these and more flags, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Room for the conversations that go on, the checkpoint of each, and as many that have ended.
    flags = ["--port", port, "--kv-scheme", scheme, "--prompt-cache-size", 3 * clients, "--log-level", "WARNING", *more]
    command = [sys.executable, "-m", "mlx_turboquant.server", "--model", model, *flags]
    environment = {**os.environ, "MLX_ENABLE_TF32": os.environ.get("MLX_ENABLE_TF32", "0")}
    process = subprocess.Popen([str(part) for part in command], env=environment, stderr=subprocess.DEVNULL)
    try:
        server = Server(port)
        while True:
            with contextlib.suppress(OSError):
                server.ask("/v1/completions", {"prompt": "Hello", "max_tokens": 1})  # answered when the model is loaded
                break
            if process.poll() is not None:
                sys.exit(f"The server ended with {process.returncode}. Run it by hand to see why: {command}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait()


def conversation(number: int, words: list[str]) -> str:
    """The system prompt of a conversation: another beginning and another length for each."""
    # The numeral comes first, so that two conversations share less than a block: what they share beyond that would be
    # taken over compressed, and an answer would depend on who came first.
    length = (70, 110, 180, 300)[number % 4]
    start = 97 * number % (len(words) - length)
    return f"{number} is the number of this text: {' '.join(words[start : start + length])}"


def talk(server: Server, system: str, turns: int, max_tokens: int) -> list[dict]:
    """The answers of a conversation: their text, prompt tokens and cached tokens."""
    messages, answers = [{"role": "system", "content": system}], []
    for turn in range(turns):
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        answer = server.ask("/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens})
        text, usage = answer["choices"][0]["message"]["content"] or "", answer["usage"]
        messages.append({"role": "assistant", "content": text})
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        counts = {"prompt": usage["prompt_tokens"], "cached": cached, "written": usage["completion_tokens"]}
        answers.append({"text": text, **counts})
    return answers


def load(server: Server, systems: list[str], clients: int, turns: int, max_tokens: int) -> tuple[list, list[dict]]:
    """All conversations' answers, and the memory after each round of the clients."""
    answers: list = [None] * len(systems)
    waiting, memory, failures = list(enumerate(systems)), [], []
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not waiting or failures:
                    return
                i, system = waiting.pop(0)
            try:
                answers[i] = talk(server, system, turns, max_tokens)
            except (OSError, RuntimeError, ValueError) as error:
                failures.append(error)
                return
            with lock:
                done = sum(len(answer) for answer in answers if answer is not None)
                health = server.ask("/health")
                kept = health["kv_cache"]["stored"]
                in_use = health["kv_cache"]["active"]["nbytes"]
                memory.append({
                    "requests": done, "active_nbytes": health["memory"]["active_nbytes"],
                    "stored_nbytes": kept["nbytes"], "stored_raw_nbytes": kept["raw_nbytes"], "in_use_nbytes": in_use,
                })  # fmt: skip

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    final = server.ask("/health")
    kept = final["kv_cache"]["stored"]
    memory.append({
        "requests": len(systems) * turns, "active_nbytes": final["memory"]["active_nbytes"],
        "stored_nbytes": kept["nbytes"], "stored_raw_nbytes": kept["raw_nbytes"],
        "in_use_nbytes": final["kv_cache"]["active"]["nbytes"],
    })  # fmt: skip
    return answers, memory


@contextlib.contextmanager
def expanded(name: str | None, dtype: str) -> Iterator[Path]:
    """A folder with the model, its weights expanded to a dtype."""
    if name is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
        import smollm2

        name = str(smollm2.model_dir())
    model, _ = load_model(name)
    model = expand(model, dtype)
    from mlx_lm.utils import hf_repo_to_path

    source = Path(name) if Path(name).exists() else hf_repo_to_path(name)
    with tempfile.TemporaryDirectory() as folder:
        for file in source.iterdir():
            if file.suffix != ".safetensors" and not file.name.endswith(".index.json") and file.is_file():
                shutil.copy(file, folder)
        config = json.loads((source / "config.json").read_text())
        kept = {key: value for key, value in config.items() if not key.startswith("quantization")}
        (Path(folder) / "config.json").write_text(json.dumps(kept))
        mx.save_safetensors(f"{folder}/model.safetensors", dict(tree_flatten(model.parameters())), {"format": "mlx"})
        del model
        mx.clear_cache()
        yield Path(folder)


def main() -> None:
    """Run both servers and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--kv-scheme", default="turbo4")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--requests", type=int, default=200, help="at least clients times turns (200)")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--minutes", type=float, help="mixed traffic for so long, instead of so many requests")
    parser.add_argument("--kv-memory-limit", help="of the server, with --minutes")
    parser.add_argument("--kv-queue-seconds", type=float, default=60, help="of the server, with --kv-memory-limit (60)")
    parser.add_argument("--tiny", action="store_true", help="a random model of 2 layers that reads letters")
    args = parser.parse_args()
    if args.tiny and args.model is not None:
        parser.error("--tiny and --model both name a model: leave out one")
    if args.minutes is None and args.kv_memory_limit is not None:
        parser.error("--kv-memory-limit wants --minutes beside it")
    if args.minutes is not None:
        sys.exit(soak(args))
    if min(args.clients, args.turns, args.max_tokens) < 1 or args.requests < args.clients * args.turns:
        parser.error("--clients, --turns and --max-tokens must be at least 1, --requests at least clients times turns")
    topics = pydoc_data.topics.topics
    words = " ".join(topics[key] for key in sorted(topics)).split()
    systems = [conversation(i, words) for i in range(-(-args.requests // args.turns))]
    with expanded(args.model, args.dtype) as folder:
        with serving(folder, args.kv_scheme, args.clients) as server:
            alone = [talk(server, system, args.turns, args.max_tokens) for system in systems[: args.clients]]
        with serving(folder, args.kv_scheme, args.clients) as server:
            start = time.perf_counter()
            answers, memory = load(server, systems, args.clients, args.turns, args.max_tokens)
            seconds = time.perf_counter() - start
    print(card(args.model or "SmolLM2-135M-Instruct", f"{args.clients} clients, {args.turns} turns, {args.dtype}"))
    report = summary(args, alone, answers, memory, seconds)
    print(table(report))
    print(json.dumps(report))
    sys.exit(0 if report["answers_equal"] == report["answers_compared"] and report["hits_missed"] == 0 else 1)


def soak(args: argparse.Namespace) -> int:
    """Mixed traffic for --minutes; 1 if something was wrong."""
    topics = pydoc_data.topics.topics
    words = " ".join(topics[key] for key in sorted(topics)).split()
    if args.tiny:
        words = [word[:2] for word in words]  # each letter is a token: 140 to 600 of them
    # So many that the store has forgotten a conversation before it is asked for again.
    systems = [conversation(i, words) for i in range(4 * args.clients)]
    flags = ["--max-prompt-tokens", server_soak.PROMPT_LIMIT]
    with server_soak.tiny_model() if args.tiny else expanded(args.model, args.dtype) as folder:
        with serving(folder, args.kv_scheme, args.clients, *flags) as server:

            def ask(body: dict) -> dict:
                return server.ask("/v1/chat/completions", body)

            alone = [
                list(server_soak.turns(ask, i, system, QUESTIONS[:2], args.max_tokens))
                for i, system in enumerate(systems)
            ]
        if args.kv_memory_limit is not None:
            flags += ["--kv-memory-limit", args.kv_memory_limit, "--kv-queue-seconds", args.kv_queue_seconds]
        with serving(folder, args.kv_scheme, args.clients, *flags) as server:
            run = server_soak.Soak(server.port, systems, alone, QUESTIONS[:2], args.max_tokens)
            run.run(args.clients, args.minutes)
            end = time.monotonic() + 60  # cancelled ones are noticed when their next word is written
            while (last := run.health())["kv_cache"]["active"]["sequences"] and time.monotonic() < end:
                time.sleep(0.5)
    print(card("a random model of 2 layers" if args.tiny else args.model or "SmolLM2-135M-Instruct", args.dtype))
    report = {"kv_scheme": args.kv_scheme, "clients": args.clients, "minutes": args.minutes, **run.summary(last)}
    print(run.table(report))
    print(json.dumps(report))
    return int(run.failed(report))


def summary(args: argparse.Namespace, alone: list, answers: list, memory: list[dict], seconds: float) -> dict:
    """What was found, as numbers."""
    pairs = [
        pair for one, many in zip(alone, answers[: len(alone)], strict=True) for pair in zip(one, many, strict=True)
    ]
    turns = [turn for answer in answers for turn in answer]
    later = [turn for answer in answers for turn in answer[1:]]
    early = next((at for at in memory if at["requests"] >= 20), memory[0])
    return {
        "kv_scheme": args.kv_scheme, "clients": args.clients, "turns": args.turns, "requests": len(turns),
        "answers_compared": len(pairs), "answers_equal": sum(one["text"] == other["text"] for one, other in pairs),
        "later_turns": len(later), "hits_missed": sum(turn["cached"] <= 4 for turn in later),
        "prompt_tokens": sum(turn["prompt"] for turn in turns), "cached_tokens": sum(turn["cached"] for turn in turns),
        "written_tokens": sum(turn["written"] for turn in turns), "seconds": round(seconds, 1),
        "memory_early": early, "memory_late": memory[-1],
    }  # fmt: skip


def table(report: dict) -> str:
    """The report as Markdown."""
    early, late = report["memory_early"], report["memory_late"]
    hits = report["later_turns"] - report["hits_missed"]

    def rest(at: dict) -> str:
        return f"{(at['active_nbytes'] - at['stored_nbytes'] - at['in_use_nbytes']) / 1e6:,.1f}"

    rows = [
        ("answers equal to the single client's", f"{report['answers_equal']} of {report['answers_compared']}"),
        ("later turns that found their prefix", f"{hits} of {report['later_turns']}"),
        ("prompt tokens taken from the store", f"{report['cached_tokens']:,} of {report['prompt_tokens']:,}"),
        ("requests in seconds", f"{report['requests']} in {report['seconds']}"),
        ("tokens written", f"{report['written_tokens']:,}"),
        *(
            (f"after {at['requests']} requests: active memory, stored KV, all but KV (MB)",
             f"{at['active_nbytes'] / 1e6:,.1f}, {at['stored_nbytes'] / 1e6:,.1f}, {rest(at)}")
            for at in (early, late)
        ),
        ("stored KV against raw", f"{late['stored_nbytes']:,} of {late['stored_raw_nbytes']:,} bytes"),
    ]  # fmt: skip
    return "\n".join([f"| {report['kv_scheme']} | |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])


if __name__ == "__main__":
    main()

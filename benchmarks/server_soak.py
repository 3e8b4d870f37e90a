"""Minutes of mixed traffic against one server: answers, cancellations, errors on purpose, refusals, memory's slope.

Used by `server_load.py --minutes`. Conversations of two turns come from a fixed list; a single client asked all of them
before. A later answer is compared with the single client's if both found as many tokens in the server's store: what was
read over compressed rows may differ from what was read raw.
"""

import contextlib
import http.client
import itertools
import json
import math
import random
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

PROMPT_LIMIT = 4000  # --max-prompt-tokens of the server
# (body, the status it must be answered with, words of the answer)
ERRORS: tuple[tuple[Any, int, str], ...] = (
    ({"prompt": "word " * (3 * PROMPT_LIMIT), "max_tokens": 2}, 404, "are taken (--max-prompt-tokens)"),
    ("{not JSON", 400, "Invalid JSON"),
    ({"prompt": ""}, 404, "The prompt is empty"),
    ({"prompt": "word", "temperature": -1}, 400, "temperature must be at least 0"),
    ({"prompt": "word", "stop": [7]}, 404, "stop must be a text"),
    ({}, 400, "did not contain a prompt"),
)


def post(port: int, path: str, body: Any, seconds: float = 300) -> tuple[int, dict, dict]:
    """(status, headers, the decoded answer)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    with contextlib.closing(connection):
        connection.request("POST", path, body if isinstance(body, str) else json.dumps(body))
        response = connection.getresponse()
        return response.status, dict(response.headers), json.loads(response.read())


def leave(port: int, body: dict, events: int) -> bool:
    """Ask for a stream, read so many lines and close; False if it was refused or ended before."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}))
        response = connection.getresponse()
        if response.status != 200:
            return False
        for _ in range(events):
            if not response.readline():
                return False
        # Closed at once, with a reset, as by a client that is gone.
        if connection.sock is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        response.close()
    return True


def chat(messages: list[dict], number: int, most: int) -> dict:
    """The body of a turn; lengths of answers are mixed too."""
    return {"messages": messages, "max_tokens": (most, 2 * most, 4 * most)[number % 3]}


def turns(ask: Callable[[dict], dict | None], number: int, system: str, questions: tuple, most: int):
    """Each turn's (text, cached tokens) as it is answered; ends where one is refused."""
    messages = [{"role": "system", "content": system}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = ask(chat(messages, number, most))
        if answer is None:
            return
        text = answer["choices"][0]["message"]["content"] or ""
        messages.append({"role": "assistant", "content": text})
        yield text, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


class Soak:
    """Clients that ask until the time is over, and what they counted."""

    def __init__(self, port: int, systems: list[str], alone: list[list], questions: tuple, most: int):
        self.port, self.systems, self.alone, self.questions, self.most = port, systems, alone, questions, most
        self.counts: Counter = Counter()
        self.notes: list[str] = []
        self.samples: list[dict] = []
        self._lock, self._next = threading.Lock(), 0

    def run(self, clients: int, minutes: float) -> None:
        """Ask for so many minutes, then wait for the last answers."""
        end = time.monotonic() + 60 * minutes
        threads = [threading.Thread(target=self._client, args=(end, random.Random(i))) for i in range(clients)]
        watch = threading.Thread(target=self._watch, args=(end,))
        for thread in (*threads, watch):
            thread.start()
        for thread in (*threads, watch):
            thread.join()

    def _count(self, what: str, note: str | None = None) -> None:
        with self._lock:
            self.counts[what] += 1
            if note is not None and len(self.notes) < 20:
                self.notes.append(f"{what}: {note}")

    def _client(self, end: float, chance: random.Random) -> None:
        while time.monotonic() < end:
            with self._lock:
                number, self._next = self._next % len(self.systems), self._next + 1
            kind = chance.random()
            try:
                if kind < 0.1:
                    self._err(chance.choice(ERRORS))
                elif kind < 0.25:
                    messages = [{"role": "user", "content": f"{chance.random()} {self.systems[number]}"}]
                    left = leave(self.port, {"messages": messages, "max_tokens": 400}, chance.randint(0, 12))
                    self._count("cancelled" if left else "not_cancelled")
                else:
                    self._talk(number)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._count("lost", repr(error))

    def _err(self, case: tuple[Any, int, str]) -> None:
        body, wanted, words = case
        status, _, answer = post(self.port, "/v1/completions", body)
        right = status == wanted and words in answer.get("error", "")
        self._count("errors_answered" if right else "errors_wrong", None if right else f"{status} {answer}")

    def _talk(self, number: int) -> None:
        def ask(body: dict) -> dict | None:
            status, headers, answer = post(self.port, "/v1/chat/completions", body)
            if status == 200:
                self._count("served")
                return answer
            refused = status == 503 and int(headers.get("Retry-After", 0)) > 0
            self._count("refused_503" if refused else "lost", None if refused else f"{status} {answer}")
            return None

        said = turns(ask, number, self.systems[number], self.questions, self.most)
        for i, ((text, cached), (wanted, found)) in enumerate(zip(said, self.alone[number], strict=False)):
            if cached != found:
                self._count("not_comparable")
                return  # what follows has another history
            if text != wanted:
                self._count("wrong", f"conversation {number}, turn {i}: {text!r}, alone {wanted!r}")
                return
            self._count("right")

    def _watch(self, end: float) -> None:
        while time.monotonic() < end:
            time.sleep(2)
            try:
                health = self.health()
            except (OSError, http.client.HTTPException) as error:
                self._count("health_lost", repr(error))
                continue
            kept, used = health["kv_cache"]["stored"]["nbytes"], health["kv_cache"]["active"]["nbytes"]
            with self._lock:
                done = sum(self.counts[what] for what in ("served", "cancelled", "errors_answered", "refused_503"))
            active = health["memory"]["active_nbytes"]
            self.samples.append(
                {"requests": done, "active": active, "rest": active - kept - used, "kv": kept + used,
                 "sequences": health["kv_cache"]["active"]["sequences"]}
            )  # fmt: skip

    def health(self) -> dict:
        """The answer of /health."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())

    def summary(self, last: dict) -> dict:
        """The counts, the peaks and the slopes of memory; `last` is /health at the end."""
        slopes = {name: slope(self.samples[len(self.samples) // 4 :], name) for name in ("active", "rest")}
        names = ("served", "right", "wrong", "lost", "cancelled", "errors_answered", "errors_wrong", "refused_503")
        return {
            **dict.fromkeys(names, 0), **self.counts,
            "peak_kv_nbytes": max(one["kv"] for one in self.samples), "limit": last["kv_memory_limit"],
            "most_running": max(one["sequences"] for one in self.samples),
            "running_at_the_end": last["kv_cache"]["active"]["sequences"],
            **{f"{name}_bytes_per_request": round(b, 1) for name, (b, _) in slopes.items()},
            **{f"{name}_plus_minus": round(half, 1) for name, (_, half) in slopes.items()},
        }  # fmt: skip

    def failed(self, report: dict) -> bool:
        """Whether something was wrong."""
        grows = any(report[f"{name}_bytes_per_request"] > report[f"{name}_plus_minus"] for name in ("active", "rest"))
        over = report["limit"] is not None and report["peak_kv_nbytes"] > report["limit"]
        bad = ("wrong", "lost", "errors_wrong", "health_lost", "running_at_the_end")
        return grows or over or any(report.get(what, 0) for what in bad)

    def table(self, report: dict) -> str:
        """The report as Markdown, and what went wrong."""
        rows = [
            f"| {key.replace('_', ' ')} | {value:,} |" for key, value in report.items() if type(value) in (int, float)
        ]
        return "\n".join([f"| {report['kv_scheme']} | |", "| --- | --- |", *rows, *self.notes])


def slope(samples: list[dict], name: str) -> tuple[float, float]:
    """Bytes per request by least squares, and half of its 95% interval.

    Samples that follow one another are alike, so they count for fewer: for n (1 - r) / (1 + r) of n, where r is the
    correlation of the residuals of neighbours.
    """
    n = len(samples)
    if n < 10:
        raise ValueError(f"[server_soak] wanted at least 10 samples of memory, got {n}. Give --minutes at least 1.")
    x, y = [float(one["requests"]) for one in samples], [float(one[name]) for one in samples]
    mx, my = sum(x) / n, sum(y) / n
    spread = sum((a - mx) ** 2 for a in x)
    b = sum((a - mx) * (c - my) for a, c in zip(x, y, strict=True)) / spread
    left = [c - my - b * (a - mx) for a, c in zip(x, y, strict=True)]
    squares = sum(e * e for e in left)
    r = max(sum(a * c for a, c in itertools.pairwise(left)) / squares, 0.0) if squares else 0.0
    independent = max(n * (1 - r) / (1 + r), 3.0)
    return b, 1.96 * math.sqrt(squares / (independent - 2) / (spread * independent / n))


@contextlib.contextmanager
def tiny_model() -> Iterator[Path]:
    """A folder with a random Llama of 2 layers (key heads: 2 of 64) and a tokenizer of letters."""
    from mlx_lm.models import llama
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 96,
    }  # fmt: skip
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**config))
    for layer in model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight *= 3  # sharp enough that a wrong key changes the answer
    pieces = ["<unk>", "<eos>", *(chr(i) for i in range(33, 127))]  # each letter of ASCII is a token
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<unk>"))
    letter = pre_tokenizers.Split(Regex("."), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letter])
    backend.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m['content'] }} ! {% endfor %}{% if add_generation_prompt %}?{% endif %}"
    with tempfile.TemporaryDirectory() as folder:
        config |= {"architectures": ["LlamaForCausalLM"], "eos_token_id": 1}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        mx.save_safetensors(f"{folder}/model.safetensors", dict(tree_flatten(model.parameters())), {"format": "mlx"})
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        yield Path(folder)

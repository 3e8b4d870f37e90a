"""--kv-memory-limit: who waits, who is refused, what is forgotten, and what the server tells about it."""

import contextlib
import json
import re
import socket
import threading
import time

import mlx_lm
import pytest
from mlx_lm import server
from test_server import TEMPLATE, arguments, served, serving, wait_until, words

from mlx_turboquant import make_prompt_cache
from mlx_turboquant.cli.server_needs import KVNeeds, Need, used_layers

# A limit that fits one request of these lengths, and no other that is as long beside any.
LARGE = 6000


def alone(model, need):
    return KVNeeds(used_layers(model, make_prompt_cache(model, kv_scheme="turbo4")), 2048, 8).nbytes([need], [need])


@pytest.fixture(scope="module")
def loaded(model_dir):
    return mlx_lm.load(str(model_dir), tokenizer_config={"chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def limited(model_dir, loaded):
    """A server with room for one large request."""
    limit = alone(loaded[0], Need(40, 40 + LARGE))
    flags = ("--kv-scheme", "turbo4", "--kv-memory-limit", limit, "--kv-queue-seconds", 30, "--chat-template", TEMPLATE)
    with serving(model_dir, *flags) as client:
        assert client.generator.kv_memory_limit == limit
        yield client


@contextlib.contextmanager
def running(client, seed, most=2000):
    """A long request that is being served; the lines of its stream so far, until the block ends."""
    body = {"prompt": words(30, seed), "max_tokens": most, "stream": True, "logit_bias": {"1": -100}}  # no end before
    connection, response = client.open("/v1/completions", body)
    lines, gone = [], threading.Event()

    def read():
        with contextlib.suppress(OSError, AttributeError, ValueError):
            while not gone.is_set() and (line := response.readline()):
                lines.append(line)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        wait_until(lambda: len(lines) > 4)
        yield lines
    finally:
        gone.set()
        thread.join()
        response.close()
        connection.close()


def numbers(client):
    """The samples of /metrics."""
    connection, response = client.open("/metrics", None)
    with contextlib.closing(connection):
        assert response.status == 200 and response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = response.read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert text.endswith("\n") and all(re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"\})? \d+', line) for line in lines)
    return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_request_waits_until_another_ends_and_they_begin_in_order(limited, monkeypatch):
    budget, begun, done = limited.generator._budget, [], []
    begin = budget.begin
    monkeypatch.setattr(budget, "begin", lambda key: (begun.append(budget.next.prompt), begin(key)))

    def ask(name):
        if name == 0:
            with running(limited, 70, LARGE) as lines:
                done.append(len(lines))
        else:
            done.append(limited.complete(words(30 + name, 70 + name), max_tokens=1))

    with running(limited, 1) as lines:
        begun.clear()
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for i, thread in enumerate(threads):
            thread.start()
            wait_until(lambda i=i: limited.generator.queued == i + 1)
        # The first does not fit; those behind it would, and wait all the same.
        seen, before = numbers(limited), len(lines)
        wait_until(lambda: len(lines) > before + 20)
        assert seen["mlx_turboquant_requests_queued"] == 3 and not done
        assert seen['mlx_turboquant_kv_sequences{state="running"}'] == 1
    wait_until(lambda: limited.generator.queued == 0)
    for thread in threads:
        thread.join()
    assert begun == [30, 31, 32] and len(done) == 3
    assert limited.ask("/health")[1]["requests"] == {"queued": 0, "refused": 0}


def test_a_request_that_waited_too_long_is_told_when_to_come_again(limited):
    wait_until(lambda: served(limited)["sequences"] == 0)
    limited.generator.cli_args.kv_queue_seconds = 1.2
    refused = limited.generator.refused
    try:
        with running(limited, 2) as lines:
            body = {"prompt": words(30, 80), "max_tokens": LARGE, "stream": True}
            start = time.monotonic()
            connection, response = limited.open("/v1/completions", body)
            with contextlib.closing(connection):
                assert response.status == 503 and response.headers["Retry-After"] == "2"
                assert time.monotonic() - start >= 1.2
                error = json.loads(response.read())["error"]
            limit = limited.generator.kv_memory_limit
            assert re.search(rf"within 1\.2 seconds .* reserved [\d,]+ of {limit:,} bytes", error)
            before = len(lines)
            wait_until(lambda: len(lines) > before)  # what runs goes on
            assert limited.complete(words(5, 81), max_tokens=2)[0]  # and a small one fits beside it
    finally:
        limited.generator.cli_args.kv_queue_seconds = 30
    assert numbers(limited)["mlx_turboquant_requests_refused_total"] == refused + 1


def test_clients_that_leave_give_their_bytes_back(limited):
    for seed in range(2):
        with running(limited, 10 + seed):
            assert wait_until(lambda: limited.generator._budget.reserved()) > 0
        wait_until(lambda: limited.generator._budget.reserved() == 0)
    assert served(limited) == {"sequences": 0, "nbytes": 0, "raw_nbytes": 0}
    assert numbers(limited)['mlx_turboquant_kv_bytes{state="running"}'] == 0


def test_a_request_that_can_never_fit_is_refused_at_once_with_the_numbers(limited, loaded):
    need = Need(30, 30 + 9000)
    start = time.monotonic()
    connection, response = limited.open("/v1/completions", {"prompt": words(30, 90), "max_tokens": 9000})
    with contextlib.closing(connection):
        error = json.loads(response.read())["error"]
        assert response.status == 413 and "Retry-After" not in response.headers and time.monotonic() - start < 10
    limit = limited.generator.kv_memory_limit
    assert (
        f"at most {limit:,} KV bytes (--kv-memory-limit), got a request that needs {alone(loaded[0], need):,}" in error
    )
    assert "30 tokens of prompt and up to 9,000 more" in error
    assert limited.complete(words(30, 90))[0]


def test_stored_conversations_are_forgotten_before_a_request_waits(limited):
    limited.generator.prompt_cache.trim_to(n_sequences=0)
    refused = limited.generator.refused
    for seed in range(10):
        limited.complete(words(200, 100 + seed), max_tokens=2)
    wait_until(lambda: served(limited)["sequences"] == 0)
    stored = limited.generator.prompt_cache.held
    assert stored["sequences"] > 5
    with running(limited, 3):
        left = limited.generator.prompt_cache.held
        assert 0 < left["sequences"] < stored["sequences"]  # the oldest are gone, and no more than were in the way
        assert left["nbytes"] <= limited.generator._budget.left()
        assert limited.complete(words(200, 109), max_tokens=1)[1] == 199
    assert limited.generator.refused == refused


def test_what_is_stored_takes_no_more_than_running_requests_leave(limited):
    with running(limited, 4):
        for seed in range(4):
            limited.complete(words(150, 120 + seed), max_tokens=2)
            held, left = limited.generator.prompt_cache.held["nbytes"], limited.generator._budget.left()
            assert held <= left + alone(limited.generator.model_provider.model, Need(150, 152))
        wait_until(lambda: served(limited)["sequences"] <= 1)
        health = limited.ask("/health")[1]
        assert sum(health["kv_cache"][what]["nbytes"] for what in ("stored", "active")) <= health["kv_memory_limit"]


def test_a_draft_model_is_counted_too(model_dir, loaded):
    prompt, both = words(100, 5), Need(100, 100 + 50)
    one = alone(loaded[0], both)
    with serving(model_dir, "--kv-scheme", "turbo4", "--kv-memory-limit", int(1.8 * one)) as client:
        assert client.complete(prompt, max_tokens=50)[0]
    flags = ("--draft-model", model_dir, "--num-draft-tokens", 3)
    with serving(model_dir, "--kv-scheme", "turbo4", "--kv-memory-limit", int(1.8 * one), *flags) as client:
        status, answer = client.ask("/v1/completions", {"prompt": prompt, "max_tokens": 50})
        assert status == 413 and "--kv-memory-limit" in answer["error"]
        assert client.complete(words(20, 6), max_tokens=2)[0]
        wait_until(lambda: client.generator._budget.reserved() == 0)


def test_many_clients_that_connect_at_once_are_all_heard(limited):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(100)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", limited.port))
        for client in clients:
            client.settimeout(20)
            with contextlib.suppress(BlockingIOError):
                client.connect_ex(("127.0.0.1", limited.port))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert all(client.makefile("rb").read().startswith(b"HTTP/1.0 200") for client in clients)


def test_without_the_flag_nothing_is_limited(model_dir, monkeypatch, capsys):
    with serving(model_dir, "--kv-scheme", "turbo4") as client:
        assert type(client.generator).__name__ == "SchemeResponseGenerator"
        assert client.generator.prompt_cache.most_nbytes is None
        answer = client.ask("/health")[1]
        assert answer["kv_memory_limit"] is None and answer["requests"] == {"queued": 0, "refused": 0}
        told = numbers(client)
        assert "mlx_turboquant_kv_limit_bytes" not in told and told['mlx_turboquant_scheme_info{scheme="turbo4"}'] == 1
    for flags, message in (
        (("--kv-queue-seconds", 5), "--kv-queue-seconds wants --kv-memory-limit beside it"),
        (("--kv-memory-limit", "1GB", "--kv-queue-seconds", -1), "must be a number of at least 0"),
        (("--kv-memory-limit", "1GB", "--kv-queue-seconds", "nan"), "must be a number of at least 0"),
        (("--kv-memory-limit", "many"), "wants a number above 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            arguments(monkeypatch, *flags)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        arguments(monkeypatch, "--kv-memory-limit", "4GB")
    assert server._turboquant_args.kv_memory_limit == 4 << 30 and server._turboquant_args.kv_queue_seconds == 60

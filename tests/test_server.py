"""mlx_turboquant.server: mlx-lm's server with compressed caches, asked over HTTP in this process."""

import contextlib
import copy
import http.client
import inspect
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
from conftest import tokens
from mlx_lm import server

import mlx_turboquant
from mlx_turboquant import KVScheme, fingerprint, make_prompt_cache
from mlx_turboquant.cli import server_parts
from mlx_turboquant.cli.mlx_lm_server import extend_server
from mlx_turboquant.cli.server_models import check_models, positions
from mlx_turboquant.cli.server_store import CompressedPromptStore
from mlx_turboquant.scheme_file import LayerSchemes, save

OFFLINE = {"HF_HUB_OFFLINE": "1"}
TEMPLATE = "{% for m in messages %}{{ m['content'] }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"


class Client:
    """Asks one server, one connection per request."""

    def __init__(self, port, generator):
        self.port, self.generator = port, generator

    def open(self, path, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST" if body is not None else "GET", path, None if body is None else json.dumps(body))
        return connection, connection.getresponse()

    def ask(self, path, body=None):
        """(status, the decoded answer)"""
        connection, response = self.open(path, body)
        with contextlib.closing(connection):
            return response.status, json.loads(response.read())

    def complete(self, prompt, **more):
        """(text, cached tokens) of a completion."""
        status, answer = self.ask("/v1/completions", {"prompt": prompt, "max_tokens": 12, **more})
        assert status == 200, answer
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def stream(self, path, body):
        """The events of a streamed answer, decoded."""
        connection, response = self.open(path, {**body, "stream": True})
        with contextlib.closing(connection):
            lines = response.read().decode().splitlines()
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert response.status == 200 and events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


@contextlib.contextmanager
def serving(model_dir, *flags):
    """A client of a server that runs in a thread on a free port."""
    extend_server(server)
    started, argv = queue.Queue(), sys.argv

    class Recording(ThreadingHTTPServer):
        def server_activate(self):
            super().server_activate()
            started.put(self)

    server_parts.ThreadingHTTPServer = Recording
    sys.argv = ["server", "--model", str(model_dir), "--port", "0", "--log-level", "ERROR", *map(str, flags)]
    try:
        thread = threading.Thread(target=server.main)
        thread.start()
        httpd = started.get(timeout=30)
    finally:
        server_parts.ThreadingHTTPServer, sys.argv = ThreadingHTTPServer, argv
    # The handler's first argument, which mlx-lm's main hands to every handler.
    generator = inspect.getclosurevars(httpd.RequestHandlerClass).nonlocals["response_generator"]
    try:
        yield Client(httpd.server_port, generator)
        assert generator.is_healthy
    finally:
        httpd.shutdown()
        generator.stop_and_join()
        thread.join(timeout=10)
        httpd.server_close()


@pytest.fixture(scope="module")
def client(model_dir):
    """A server that keeps conversations."""
    with serving(model_dir, "--kv-scheme", "turbo4", "--prompt-cache-size", 100, "--chat-template", TEMPLATE) as client:
        yield client


@pytest.fixture(scope="module")
def forgetful(model_dir):
    """A server that keeps nothing, so that every answer is a first one."""
    with serving(model_dir, "--kv-scheme", "turbo4", "--prompt-cache-size", 0, "--chat-template", TEMPLATE) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(model_dir):
    return mlx_lm.load(str(model_dir), tokenizer_config={"chat_template": TEMPLATE})


def words(count, seed):
    return " ".join(f"w{2 + t % 94}" for t in tokens(count, seed)[0].tolist())


def served(client):
    return client.ask("/health")[1]["kv_cache"]["active"]


def wait_until(happened, seconds=20):
    """What `happened` returns once that is true."""
    end = time.monotonic() + seconds
    while not (result := happened()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return result


def test_a_completion_is_what_generate_writes(forgetful, loaded, prompt):
    theirs = mlx_turboquant.generate(*loaded, prompt, max_tokens=12, kv_scheme="turbo4")
    assert forgetful.complete(prompt) == (theirs, 0)


def test_the_server_batches(client):
    assert client.complete("w5 w6")[1] == 0 and client.generator.model_provider.is_batchable


def test_a_chat_is_what_generate_writes(forgetful, loaded):
    messages = [{"role": "system", "content": words(60, 1)}, {"role": "user", "content": words(80, 2)}]
    ids = loaded[1].apply_chat_template(messages, add_generation_prompt=True)
    theirs = mlx_turboquant.generate(*loaded, ids, max_tokens=12, kv_scheme="turbo4")
    status, answer = forgetful.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 12})
    assert status == 200 and answer["choices"][0]["message"]["content"] == theirs
    assert answer["usage"]["prompt_tokens"] == len(ids) > 140


def test_streaming_gives_the_same_text_in_pieces(forgetful, prompt):
    text, _ = forgetful.complete(prompt)
    events = forgetful.stream("/v1/completions", {"prompt": prompt, "max_tokens": 12})
    pieces = [event["choices"][0]["text"] for event in events]
    assert "".join(pieces) == text and len(pieces) > 3


def test_clients_at_the_same_time_get_what_each_would_get_alone(forgetful):
    prompts = [words(n, n) for n in (5, 90, 150, 40, 230)]
    alone = [forgetful.complete(prompt) for prompt in prompts]
    together = [None] * len(prompts)

    def ask(i):
        together[i] = forgetful.complete(prompts[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_second_turn_starts_from_the_stored_conversation(client, loaded):
    model, tokenizer = loaded
    first = words(150, 11)
    text, cached = client.complete(first)
    assert cached == 0 and len(text.split()) == 12
    more = words(20, 12)
    answer, cached = client.complete(f"{first} {text} {more}")
    assert cached == 162

    cache = make_prompt_cache(model, kv_scheme="turbo4")
    assert mlx_turboquant.generate(model, tokenizer, first, max_tokens=12, prompt_cache=cache) == text
    for layer in cache:
        layer.compress()  # what is stored is
    assert mlx_turboquant.generate(model, tokenizer, more, max_tokens=12, prompt_cache=cache) == answer


def test_a_prompt_that_is_stored_whole_reads_its_last_token_again(client):
    first = words(100, 21)
    text, _ = client.complete(first)
    again, cached = client.complete(f"{first} {text}")
    assert cached == 111 and again


def test_a_shared_beginning_is_reused_up_to_where_prompts_part(client):
    shared = words(120, 31)
    client.complete(f"{shared} w5 w6")
    _, cached = client.complete(f"{shared} w7 w8")
    assert cached == 120


def test_health_tells_the_scheme_and_the_bytes(client, prompt):
    client.complete(prompt)
    wait_until(lambda: served(client)["sequences"] == 0)
    status, answer = client.ask("/health")
    assert status == 200 and answer["status"] == "ok" and answer["kv_scheme"] == "turbo4"
    assert answer["memory"]["peak_nbytes"] >= answer["memory"]["active_nbytes"] > answer["kv_cache"]["stored"]["nbytes"]
    stored, active = answer["kv_cache"]["stored"], answer["kv_cache"]["active"]
    assert active == {"sequences": 0, "nbytes": 0, "raw_nbytes": 0}
    entries = client.generator.prompt_cache
    assert stored["sequences"] == len(entries) > 0
    assert stored["nbytes"] == entries.nbytes and stored["raw_nbytes"] > 1.2 * stored["nbytes"]


def test_health_tells_what_is_being_served(client):
    connection, response = client.open("/v1/completions", {"prompt": words(90, 41), "max_tokens": 300, "stream": True})
    response.readline()
    seen = wait_until(lambda: (active := served(client))["sequences"] and active)
    connection.close()
    assert seen["sequences"] == 1 and seen["nbytes"] > 0 and seen["raw_nbytes"] > 0


def test_a_client_that_leaves_harms_no_other(client):
    connection, response = client.open("/v1/completions", {"prompt": words(90, 51), "max_tokens": 5000, "stream": True})
    response.readline()
    response.close()
    connection.close()
    assert client.complete(words(30, 52))[0]
    wait_until(lambda: served(client)["sequences"] == 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "w5", "model": "/nowhere/model"}, "'/nowhere/model' is neither a folder nor can be fetched"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "w5", "stop": ["w6", ""]}, "stop must be a text or a list of texts"),
        ({"prompt": "w5", "stop": [7]}, "stop must be a text or a list of texts"),
        ({"prompt": "w5", "temperature": -1}, "temperature must be at least 0"),
        ({}, "Request did not contain a prompt"),
    ],
)
def test_a_bad_request_is_answered_and_the_model_stays(client, body, message):
    model = client.generator.model_provider.model
    status, answer = client.ask("/v1/completions", body)
    assert 400 <= status < 500 and message in answer["error"]
    assert client.complete("w5 w6 w7")[0] and client.generator.model_provider.model is model


def test_a_prompt_longer_than_the_bound_is_refused(model_dir, tmp_path):
    folder = tmp_path / "positions"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    with serving(folder, "--kv-scheme", "turbo4") as client:
        status, answer = client.ask("/v1/completions", {"prompt": words(41, 1), "max_tokens": 2})
        assert (
            status == 404
            and "The prompt has 41 tokens, at most 40 are taken (the model's positions)" in answer["error"]
        )
        assert client.complete(words(40, 1))[0]
    with serving(folder, "--max-prompt-tokens", 50) as client:
        assert client.ask("/health")[1]["kv_scheme"] == "fp16"
        assert client.complete(words(41, 1))[0]
        status, answer = client.ask("/v1/completions", {"prompt": words(51, 1)})
        assert status == 404 and "at most 50 are taken (--max-prompt-tokens)" in answer["error"]


def test_positions_count_rope_scaling():
    def model(**config):
        return SimpleNamespace(args=SimpleNamespace(**config))

    assert positions(SimpleNamespace()) is positions(model(max_position_embeddings=None)) is None
    assert positions(model(max_position_embeddings=4096, rope_scaling=None)) == 4096
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768}
    assert positions(model(max_position_embeddings=32768, rope_scaling=yarn)) == 131072
    llama3 = {"factor": 8.0, "original_max_position_embeddings": 8192}
    assert positions(model(max_position_embeddings=131072, rope_scaling=llama3)) == 131072


def test_a_draft_model_serves_and_its_conversations_go_on(model_dir):
    flags = ("--kv-scheme", "turbo4", "--draft-model", model_dir, "--num-draft-tokens", 3)
    with serving(model_dir, *flags) as client:
        first = words(150, 61)
        status, answer = client.ask("/v1/completions", {"prompt": first, "max_tokens": 12, "num_draft_tokens": 8})
        assert status == 404 and "Draft at most 7 tokens at a time" in answer["error"]
        text, _ = client.complete(first)
        wait_until(lambda: len(client.generator.prompt_cache))  # a request served alone is stored after its answer
        stored = client.generator.prompt_cache._lru._lrus["assistant"][0]
        entry = client.generator.prompt_cache._trie.get(*stored).prompt_cache
        # Every layer of both models holds just the tokens that it is stored under.
        assert {layer.offset for layer in entry} == {len(stored[1])} and len(entry) == 4
        assert all(layer.block_tokens == 128 for layer in entry)
        answer, cached = client.complete(f"{first} {text} w5 w6 w7")
        assert cached == len(stored[1]) and answer
        assert served(client)["sequences"] == 0


def test_a_draft_model_with_another_tokenizer_is_refused(model_dir, tmp_path):
    other = tmp_path / "draft"
    shutil.copytree(model_dir, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["v7"] = vocabulary.pop("w7")  # as many tokens, one of them another
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=rf"\[server\] The draft model {other} has another tokenizer .*number 7 "):
        check_models(str(model_dir), str(other), {})
    check_models(str(model_dir), str(model_dir), {})
    with serving(model_dir, "--kv-scheme", "turbo4") as client:
        client.complete("w5")
        model = client.generator.model_provider.model
        status, answer = client.ask("/v1/completions", {"prompt": "w5", "draft_model": str(other)})
        assert status == 404 and "another tokenizer" in answer["error"]
        assert client.complete("w5")[0] and client.generator.model_provider.model is model


def arguments(monkeypatch, *flags):
    """Parse server flags as main does, up to where a model would be loaded."""
    extend_server(server)
    monkeypatch.setattr(sys, "argv", ["server", *map(str, flags)])
    monkeypatch.setattr(server, "maybe_set_recommended_wired_limit", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    server.main()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kv-scheme", "turb4"), "Did you mean 'turbo4'?"),
        (("--kv-scheme", "turbo4", "--kv-bits", 4), "--kv-bits 4 conflicts with --kv-scheme turbo4"),
        (("--kv-scheme", "@/nowhere/plan.json"), "/nowhere/plan.json"),
        (("--max-prompt-tokens", 0), "must be at least 1"),
        (("--kv-scheme", "turbo4", "--draft-model", "d", "--num-draft-tokens", 8), "Draft at most 7 tokens"),
    ],
)
def test_bad_flags_are_refused_before_a_model_is_loaded(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        arguments(monkeypatch, *flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_our_flags_the_server_is_mlx_lms(monkeypatch):
    for flags, ours in ((("--kv-scheme", "turbo4"), True), ((), False), (("--kv-bits", 8), False)):
        with pytest.raises(KeyboardInterrupt):
            arguments(monkeypatch, *flags)
        assert (server.ModelProvider.__module__ != "mlx_lm.server") is ours
        assert (server.make_prompt_cache.__module__ != "mlx_lm.models.cache") is ours


def test_a_scheme_file_gives_each_layer_its_own(model_dir, loaded, tmp_path, prompt):
    file = tmp_path / "plan.json"
    schemes = LayerSchemes((KVScheme.parse("turbo4"), KVScheme.parse("fp16")), fingerprint(loaded[0]))
    save(file, schemes)
    flags = ("--kv-scheme", f"@{file}", "--prompt-cache-size", 0, "--prompt-cache-bytes", "3MB")
    with serving(model_dir, *flags) as client:
        assert client.generator.prompt_cache.max_bytes == 3_000_000
        theirs = mlx_turboquant.generate(*loaded, prompt, max_tokens=12, kv_scheme=schemes)
        assert client.complete(prompt) == (theirs, 0)
        assert client.ask("/health")[1]["kv_scheme"] == f"@{file}"


def test_a_server_that_cannot_start_ends_with_the_reason(model_dir, tmp_path):
    def start(*flags):
        command = [sys.executable, "-m", "mlx_turboquant.server", "--port", "0", *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **OFFLINE})
        return done.returncode, done.stderr.splitlines()[-1]

    code, last = start("--model", tmp_path / "none", "--kv-scheme", "turbo4")
    assert code == 2 and last.startswith("mlx_turboquant.server: error: [server] Model ")
    save(tmp_path / "plan.json", LayerSchemes((KVScheme.parse("turbo4"),) * 2, "0123456789abcdef"))
    code, last = start("--model", model_dir, "--kv-scheme", f"@{tmp_path / 'plan.json'}")
    assert code == 2 and "was chosen for a model with fingerprint 0123456789abcdef" in last


# --- the store ----------------------------------------------------------------------------------------------------


def filled(model, scheme, count=150, seed=1):
    cache = make_prompt_cache(model, kv_scheme=scheme)
    ids = tokens(count, seed)
    model(ids, cache=cache)
    mx.eval([layer.state for layer in cache])
    return ids[0].tolist(), cache


def test_a_raw_checkpoint_is_compressed_before_it_is_kept(model):
    store = CompressedPromptStore()
    ids, cache = filled(model, "turbo4", 1000)
    raw = sum(layer.nbytes for layer in cache)
    store.insert_cache("m", ids, cache, cache_type="user")
    assert cache[0].block_tokens == 960
    assert store.held == {"sequences": 1, "nbytes": sum(c.nbytes for c in cache), "raw_nbytes": 2 * cache[0].raw_nbytes}
    assert store.nbytes < raw / 4  # float32 rows
    copied, rest = store.fetch_nearest_cache("m", [*ids, 5, 6])
    assert rest == [5, 6] and copied[0].offset == 1000 and copied[0] is not cache[0]


def test_a_checkpoint_that_its_conversation_replaces_is_not_counted_though_the_server_still_holds_it(model):
    store = CompressedPromptStore()
    _, checkpoint = filled(model, "turbo4", 150)
    ids, cache = filled(model, "turbo4", 200)
    store.insert_cache("m", ids[:150], checkpoint, cache_type="user")
    store.insert_cache("m", ids, cache)
    assert store.held == {"sequences": 1, "nbytes": sum(c.nbytes for c in cache), "raw_nbytes": 2 * cache[0].raw_nbytes}


def test_more_compressed_conversations_fit_into_the_same_bytes(model):
    kept = {}
    for scheme in ("fp16", "turbo4"):
        store = CompressedPromptStore(100, max_bytes=1_500_000)
        ids, cache = filled(model, scheme, 400)
        for i in range(12):
            store.insert_cache("m", [i, *ids[1:]], copy.deepcopy(cache))
            assert store.nbytes <= 1_500_000
        kept[scheme] = len(store)
        assert store.held["sequences"] == len(store) and store.held["nbytes"] == store.nbytes
        store.trim_to(n_bytes=0)
        assert store.held == {"sequences": 0, "nbytes": 0, "raw_nbytes": 0}
    assert kept["turbo4"] >= 3 * kept["fp16"] > 0


def test_an_entry_is_stored_under_the_tokens_that_all_its_layers_hold(model):
    """Where speculative decoding ends, the model can lack the last token and the draft model one more."""
    store = CompressedPromptStore()
    ids, cache = filled(model, "turbo4", 150)
    draft = filled(model, "turbo4", 149)[1]
    store.insert_cache("m", [*ids, 7], cache + draft)
    assert {layer.offset for layer in cache + draft} == {149}
    _, rest = store.fetch_nearest_cache("m", [*ids, 7, 8])
    assert rest == [ids[149], 7, 8]


def test_less_than_a_block_of_another_conversation_is_not_taken_over(model):
    store = CompressedPromptStore()
    ids, cache = filled(model, "turbo4", 150)
    store.insert_cache("m", ids, cache)
    assert store.fetch_nearest_cache("m", [*ids[:60], 1, 2]) == (None, [*ids[:60], 1, 2])
    shared, rest = store.fetch_nearest_cache("m", [*ids[:70], 1, 2])
    assert rest == [1, 2] and shared[0].offset == 70 and shared[0].block_tokens == 64
    # An entry that is used whole may be shorter than a block: it was never encoded.
    store.insert_cache("m", *filled(model, "turbo4", 30, seed=2))
    short = tokens(30, 2)[0].tolist()
    assert store.fetch_nearest_cache("m", [*short, 5])[1] == [5]
    assert store.fetch_nearest_cache("m", [*short[:20], 5])[0] is None
    # Layers that are raw anyway are exact at any length.
    store.insert_cache("m", *filled(model, "fp16", 30, seed=3))
    assert store.fetch_nearest_cache("m", [*tokens(30, 3)[0].tolist()[:20], 5])[1] == [5]


def test_a_cache_that_cannot_be_trimmed_is_not_fetched_whole(model):
    store = CompressedPromptStore()
    ids, cache = filled(model, "fp16", 30)
    store.insert_cache("m", ids, cache)
    assert store.fetch_nearest_cache("m", ids)[1] == ids[-1:]
    for layer in cache:
        layer.is_trimmable = lambda: False
    assert store.fetch_nearest_cache("m", ids) == (None, ids)

"""What the server tells at /health and, in Prometheus's text format, at /metrics."""

from typing import Any

import mlx.core as mx


def health(generator: Any) -> dict[str, Any]:
    """{"status", "kv_scheme", "kv_cache", "kv_memory_limit", "requests", "memory"}, sizes in bytes.

    Args:
        generator: the server's `SchemeResponseGenerator`. Its numbers are read as they are; nothing waits for it.
    """
    return {
        "status": "ok" if generator.is_healthy else "unavailable",
        "kv_scheme": str(generator.caches.scheme),
        "kv_cache": generator.kv_cache(),
        "kv_memory_limit": generator.kv_memory_limit,
        "requests": {"queued": generator.queued, "refused": generator.refused},
        "memory": {"active_nbytes": mx.get_active_memory(), "peak_nbytes": mx.get_peak_memory()},
    }


def metrics(generator: Any) -> str:
    """The same as text of version 0.0.4 of Prometheus's exposition format; without a limit no line tells one."""
    held = generator.kv_cache()
    states = (("running", held["active"]), ("stored", held["stored"]))
    families = [
        ("kv_bytes", "gauge", "Bytes of KV caches.", [(f'{{state="{s}"}}', each["nbytes"]) for s, each in states]),
        ("kv_sequences", "gauge", "Sequences that have a KV cache.",
         [(f'{{state="{s}"}}', each["sequences"]) for s, each in states]),
        ("memory_active_bytes", "gauge", "Memory that MLX has in use.", [("", mx.get_active_memory())]),
        ("requests_queued", "gauge", "Requests that came and have not begun.", [("", generator.queued)]),
        ("requests_refused_total", "counter", "Requests refused for their KV bytes.", [("", generator.refused)]),
        ("scheme_info", "gauge", "The scheme of the KV caches.",
         [(f'{{scheme="{_escaped(str(generator.caches.scheme))}"}}', 1)]),
    ]  # fmt: skip
    if generator.kv_memory_limit is not None:
        limit = ("kv_limit_bytes", "gauge", "Most bytes of KV caches.", [("", generator.kv_memory_limit)])
        families.insert(1, limit)
    lines = []
    for name, kind, words, samples in families:
        lines += [f"# HELP mlx_turboquant_{name} {words}", f"# TYPE mlx_turboquant_{name} {kind}"]
        lines += [f"mlx_turboquant_{name}{labels} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

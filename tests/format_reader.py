"""A literal, slow reading of docs/format.md: the keys and values of a prompt-cache file, with numpy alone.

Of the package it takes only the centroids and the parser of a scheme's text.
"""

import json

import numpy as np

from mlx_turboquant.codebook import gaussian
from mlx_turboquant.scheme import KVScheme

TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "I32": "<i4"}


def read_arrays(path):
    """The arrays of a safetensors file, by name."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    arrays = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__" and entry["dtype"] in TYPES:
            first, last = entry["data_offsets"]
            flat = np.frombuffer(data[start + first : start + last], TYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                flat = (flat.astype("<u4") << 16).view("<f4")
            arrays[name] = flat.reshape(entry["shape"])
    return arrays


def read_rows(path, side):
    """The keys (side 0) or values (side 1) of a file's first layer, (B, Hkv, tokens, D) float64."""
    arrays = read_arrays(path)
    scheme = KVScheme.parse("".join(map(chr, arrays["0.1"])))
    sinks, codes, scales, centers, tail = (arrays[f"0.{8 + side}.{part}"] for part in range(5))
    learned = [arrays[f"0.10.{side}.{i}"] for i in range(5) if f"0.10.{side}.{i}" in arrays]
    parts = [sinks] if sinks.size else []
    if codes.size:
        D, T = tail.shape[-1], codes.shape[2]
        center, balance = None, None
        if side == 0 and scheme.key_bits and scheme.center:
            center, centers = centers[..., :D], centers[..., D:]
        if side == 0 and scheme.key_bits and scheme.balance:
            balance, *learned = learned
        bits = scheme.value_bits if side else scheme.key_bits
        rows = decode(scheme, side, bits, D, codes, scales.astype(float), centers.astype(float), learned)
        if balance is not None:
            rows = rows / balance[:, :, None]
        if center is not None:
            rows = rows + np.repeat(center.astype(float), T // center.shape[2], axis=2)
        parts.append(rows)
    return np.concatenate([*parts, tail], axis=2)


def decode(scheme, side, bits, D, codes, scales, centers, learned):
    """Encoded rows by the page's table, without what is around all methods."""
    method = scheme.method
    if bits == 0:
        return codes.astype(float)
    if method == "int":
        return (unpack(codes, 8, D) - 128.0) * scales
    if method == "affine":
        groups = D // scheme.group
        step, least = (np.repeat(part, scheme.group, axis=-1) for part in (scales[..., :groups], scales[..., groups:]))
        return (unpack(codes, bits, D) * step + least) @ rotation(scheme.rotation, D, scheme.seed)
    if method == "squat" and side == 0:
        B, H = codes.shape[:2]
        per_block = scheme.block // scheme.group
        step, least = np.split(centers, 2, axis=-1)
        step, least = (
            np.repeat(part.reshape(B, H, -1, per_block, D).reshape(B, H, -1, D), scheme.group, axis=2)
            for part in (step, least)
        )
        return unpack(codes, bits, D) * step + least
    if method == "squat":
        step, least = (np.repeat(part, min(scheme.group, D), axis=-1) for part in np.split(scales, 2, axis=-1))
        return unpack(codes, bits, D) * step + least
    if method == "outlier":
        kept = round(0.15 * D)
        others = centroids(codes, bits, D - kept) * scales[..., :1]
        others = others @ rotation("hadamard", D - kept, scheme.seed)
        return in_place(np.concatenate([scales[..., 1:], others], axis=-1), learned[0])
    if method == "qjl" and side == 0:
        words = row_words(D, bits - 1)
        coded = centroids(codes[..., :words], bits - 1, D) * scales[..., :1]
        signs = 2.0 * unpack(codes[..., words:], 1, D) - 1
        S = np.random.default_rng((scheme.seed, 1)).standard_normal((D, D))
        return (coded + scales[..., 1:] * (signs @ S)) @ rotation("hadamard", D, scheme.seed)
    if bits % 1:
        half, upper, lower = D // 2, int(bits + 0.5), int(bits - 0.5)
        words = row_words(half, upper)
        halves = []
        for i, (part, width) in enumerate(((codes[..., :words], upper), (codes[..., words:], lower))):
            rows = centroids(part, width, half) * np.split(scales, 2, axis=-1)[i]
            halves.append(rows @ rotation(scheme.rotation, half, 2 * scheme.seed + i))
        return in_place(np.concatenate(halves, axis=-1), learned[0])
    return (centroids(codes, bits, D) * scales) @ rotation(scheme.rotation, D, scheme.seed)


def centroids(words, bits, count):
    """The centroids that a row's codes pick."""
    return gaussian(int(bits)).astype(float)[unpack(words, int(bits), count)]


def row_words(count, bits):
    """How many words hold a row's codes."""
    return -(-count * 2 // 32) + -(-count // 32) if bits == 3 else -(-count * bits // 32)


def unpack(words, bits, count):
    """The codes (..., count) of words (..., W)."""
    if bits == 3:
        low = -(-count * 2 // 32)
        high = words[..., low:]
        place = [4 * (j // 2) + 2 + j % 2 if j < 16 else 4 * ((j - 16) // 2) + j % 2 for j in range(32)]
        tops = (high[..., None] >> np.array(place, "u4")) & 1
        return unpack(words[..., :low], 2, count) + 4 * tops.reshape(*high.shape[:-1], -1)[..., :count]
    fields = (words[..., None] >> np.arange(0, 32, bits, dtype="u4")) & (2**bits - 1)
    return fields.reshape(*words.shape[:-1], -1)[..., :count].astype(int)


def rotation(kind, D, seed):
    """R as a matrix, so that rows times it are rows turned back."""
    if kind == "none":
        return np.eye(D)
    if kind == "dense":
        q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))
        return q * np.sign(np.diag(r))
    odd = D // (D & -D)
    angle = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    matrix, walsh = np.cos(angle) + np.sin(angle), np.ones((1, 1))
    while len(walsh) < D // odd:
        walsh = np.block([[walsh, walsh], [walsh, -walsh]])
    return np.kron(matrix, walsh) / np.sqrt(D) * np.random.default_rng(seed).choice([-1.0, 1.0], D)


def in_place(rows, order):
    """Rows whose channels stand in an order, with each channel where it was."""
    out = np.empty_like(rows)
    np.put_along_axis(out, np.broadcast_to(order[:, :, None], rows.shape), rows, axis=-1)
    return out

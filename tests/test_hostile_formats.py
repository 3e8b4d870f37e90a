"""Spoiled plans, vectors and kept logits, and paths that lead to no file; `test_hostile_files` has the rest."""

import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hostile import READERS, refused
from spoiling import parts_of, with_arrays, zeros

from mlx_turboquant import load_prompt_cache, scheme_file
from mlx_turboquant.cli.vector_files import open_vectors
from mlx_turboquant.files import open_regular
from mlx_turboquant.index import TurboQuantIndex


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


JSON = {
    "nothing": (b"", "wanted JSON"),
    "a number": (b"1", "an object of JSON, got int"),
    "NaN": (b'{"format": NaN, "layers": ["turbo4"]}', "NaN is no number"),
    "a huge number": (b'{"format": 1e999, "layers": ["turbo4"]}', "format 1 is supported, got inf"),
    "a number of many digits": (b'{"format": ' + b"1" * 10_000 + b"}", "wanted JSON"),
    "true for 1": (b'{"format": true, "layers": ["turbo4"]}', "format 1 is supported, got True"),
    "a name twice": (b'{"format": 1, "layers": ["turbo4"], "layers": ["fp16"]}', "a name stands twice"),
    "a name twice in a note": (b'{"format": 1, "layers": ["turbo4"], "n": {"a": 1, "a": 2}}', "stands twice"),
    "deep nesting": (b'{"format": 1, "layers": ' + b"[" * 400_000, "wanted JSON"),
    "many marks": (b'{"format": 1, "layers": [' + b"[]," * 300_000, "at most 400,000 of the marks"),
    "100 MB": (b'{"format": 1, "note": "' + bytes(100_000_000) + b'"}', "at most 1,048,576 bytes"),
    "no UTF-8": (b'{"format": 1, "layers": ["turbo4\xff"]}', "UTF-8, got byte 0xff at 32"),
    "UTF-16": ('{"format": 1, "layers": ["turbo4"]}'.encode("utf-16"), "UTF-8"),
    "many layers": (json.dumps({"format": 1, "layers": ["turbo4"] * 5000}).encode(), "at most 4096 printable"),
    "a long scheme": (json.dumps({"format": 1, "layers": ["turbo" + "4" * 500_000]}).encode(), "of at most 200"),
    "a scheme with a NUL": (json.dumps({"format": 1, "layers": ["turbo4\0"]}).encode(), "printable"),
    "a long model": (json.dumps({"format": 1, "layers": ["turbo4"], "model": "\n"}).encode(), "'model' must be"),
}


@pytest.mark.parametrize("case", JSON)
def test_scheme_files_that_are_none_are_refused(case, tmp_path):
    refused("scheme file", tmp_path, JSON[case][0], JSON[case][1])


def npy(header: str, body: bytes = bytes(120), version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode("latin1") + body


def described(descr: str = "'<f4'", order: str = "False", shape: str = "(5, 3)", **more) -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n", **more)


NPY = {
    "pickled objects": (described("'|O'"), "it has the dtype object, no numbers"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "do not begin as one does"),
    "an archive": (b"PK\3\4" + bytes(100), "do not begin as one does"),
    "fields": (described("[('a', '<f4')]"), "does not name one dtype"),
    "a dtype that is none": (described("'<f5'"), "it has the dtype"),
    "text": (described("'<U4'"), "no numbers"),
    "one byte less": (described(body=bytes(59)), r"wanted 60 bytes of float32 \(5, 3\), got 59"),
    "a negative shape": (described(shape="(-5, 3)"), "does not name one dtype"),
    "a huge shape": (described(shape="(4611686018427387904, 4)"), r"wanted 73,786,976,294,838,206,464 bytes"),
    "a huge empty shape": (described(shape="(0, 999999999999999999, 999999999999999999)"), "wanted 0 bytes"),
    "a hundred axes": (described(shape="(" + "1," * 100 + ")"), "wanted 4 bytes"),
    "a shape twice": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (5, 3), 'shape': (1,)}"), "one shape"),
    "deep nesting": (described(shape="(" * 9000), "does not name one dtype"),
    "many signs": (described(shape="(" + "-" * 9000 + "1,)"), "does not name one dtype"),
    "many spaces": (described(shape="(" + " " * 9000), "does not name one dtype"),
    "many numbers": (described(shape="(" + "1 ," * 2900), "does not name one dtype"),
    "a long header": (b"\x93NUMPY\2\0" + struct.pack("<I", 1 << 31) + bytes(500), "do not begin as one does"),
    "another version": (described(version=9), "do not begin as one does"),
    "only its beginning": (b"\x93NUMPY", "do not begin as one does"),
    "a program": (described("__import__('os').abort()"), "does not name one dtype"),
}


@pytest.mark.parametrize("case", NPY)
def test_npy_files_without_numbers_are_refused(case, tmp_path):
    refused("npy", tmp_path, NPY[case][0], NPY[case][1])


def test_npy_files_of_every_version_order_and_dtype_are_mapped(tmp_path):
    path = tmp_path / "x.npy"
    for version in (1, 2, 3):
        for dtype in ("<f2", ">f4", "<f8"):
            for order in ("C", "F"):
                x = np.asarray(np.arange(15).reshape(5, 3), dtype, order=order)
                with open(path, "wb") as file, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # numpy warns of the later versions
                    np.lib.format.write_array(file, x, version=(version, 0))
                found = open_vectors(str(path))
                assert isinstance(found, np.memmap) and found.dtype == np.dtype(dtype)
                np.testing.assert_array_equal(found, x)
    np.save(path, np.zeros((0, 3), np.float32))
    assert open_vectors(str(path)).shape == (0, 3)
    path.write_bytes(npy('{"shape":(5,3),"descr":"<f4","fortran_order":False}'))  # as other writers put it
    assert open_vectors(str(path)).shape == (5, 3)


@pytest.mark.parametrize("d", [0, -1, 2, 4, 1 << 30, -(1 << 31), (1 << 31) - 1])
def test_fvecs_of_other_lengths_are_refused(d, tmp_path):
    words = np.frombuffer(READERS["fvecs"].whole(), np.int32).copy()
    words[0] = d
    refused("fvecs", tmp_path, words.tobytes(), "says its first row|rows of one length")
    words[0], words[8] = 3, d
    refused("fvecs", tmp_path, words.tobytes(), "wanted rows of one length, got 3 values in row 0 and another in row 2")


LOGITS = {
    "a call less": lambda a: a.pop("7"),
    "a call more": lambda a: a.update({"99": zeros(3, 96, dtype="F16")}),
    "fewer rows": lambda a: a.update({"7": zeros(2, 96, dtype="F16")}),
    "another vocabulary": lambda a: a.update({"7": zeros(3, 95, dtype="F16")}),
    "a vocabulary below the text's": lambda a: a.update({n: zeros(s[0], 5, dtype="F16") for n, (_, s, _) in a.items()}),
    "whole numbers": lambda a: a.update({n: zeros(*s, dtype="I32") for n, (_, s, _) in a.items()}),
    "no arrays": lambda a: a.clear(),
}


@pytest.mark.parametrize("case", LOGITS)
def test_kept_logits_of_other_calls_are_computed_again(case, tmp_path):
    """Of some calls alone they would be worse than none: the others would be computed without their tokens."""
    header, body = parts_of(READERS["logits"].whole())
    arrays = {
        n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for n, e in header.items() if e and n[0] != "_"
    }
    LOGITS[case](arrays)
    refused("logits", tmp_path, with_arrays({}, arrays), "wanted logits .* The logits are computed again")


# --- paths


def loaders(path: Path) -> list:
    return [
        lambda: load_prompt_cache(path),
        lambda: TurboQuantIndex.load(path),
        lambda: scheme_file.load(path),
        lambda: open_vectors(str(path)),
    ]


SUFFIXES = (".safetensors", ".tqi", ".json", ".npy")


@pytest.mark.parametrize("which", range(4))
def test_what_is_no_file_is_said_at_once(which, tmp_path):
    path = tmp_path / f"x{SUFFIXES[which]}"

    def fails(kind, message):
        with pytest.raises(kind, match=message) as error:
            loaders(path)[which]()
        assert str(path) in str(error.value)

    fails(FileNotFoundError, None)
    path.mkdir()
    fails(ValueError, "wanted a regular file, got a folder")
    path.rmdir()
    os.mkfifo(path)
    fails(ValueError, "wanted a regular file, got a pipe")
    path.unlink()
    path.symlink_to(path)
    fails(OSError, "There is no|[Tt]oo many levels of symbolic links")
    path.unlink()
    path.symlink_to("/dev/zero")
    fails(ValueError, "wanted a regular file, got a device")
    path.unlink()
    path.touch()
    fails(ValueError, None)
    if os.geteuid():  # root may read everything
        path.chmod(0)
        fails(PermissionError, None)


def test_a_name_with_a_nul_is_no_path():
    with pytest.raises(ValueError, match=r"^\[here\] wanted a path, got one with a NUL byte"):
        open_regular("a\0b", "here")


def test_a_file_that_never_ends_is_not_begun():
    with pytest.raises(ValueError, match="got a device, /dev/zero"):
        open_regular("/dev/zero", "here")

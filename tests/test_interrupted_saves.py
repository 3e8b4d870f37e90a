"""Saves that end halfway: the old file or the new one is there, whole, and nothing beside it stays for long."""

import fcntl
import os
import threading
from pathlib import Path

import hostile
import mlx.core as mx
import pytest
from hostile import run_script

from mlx_turboquant import reference_logits
from mlx_turboquant.files import written_whole


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_leftovers_of_killed_saves_are_deleted_by_the_next_save_and_others_stay(tmp_path):
    target = tmp_path / "notes.safetensors"
    dead = tmp_path / ".other.0123abcd.mlx_turboquant.json"
    dead.write_text("half")
    others = [
        ".notes.safetensors",
        ".notes.0123abcd.safetensors",
        ".notes.xyz.mlx_turboquant.json",
        "a.0123abcd.mlx_turboquant",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".link.0123abcd.mlx_turboquant").symlink_to(tmp_path / ".notes.safetensors")
    with written_whole(target) as aside:
        assert not dead.exists() and Path(aside).parent == tmp_path
        Path(aside).write_text("first")
        with written_whole(tmp_path / "second.json") as second:  # another save into the same folder
            assert Path(aside).exists()
            Path(second).write_text("{}")
    names = {"notes.safetensors", "second.json", ".link.0123abcd.mlx_turboquant", *others}
    assert set(os.listdir(tmp_path)) == names and target.read_text() == "first"


def test_a_saved_file_gets_the_permissions_of_any_new_file_and_long_names_are_taken(tmp_path):
    name = "\u00e9" * 110 + ".safetensors"
    with written_whole(tmp_path / name) as aside:
        Path(aside).write_text("x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_lock_that_comes_too_late_is_noticed(tmp_path, monkeypatch):
    """Between making the file and locking it another save may take it for a leftover."""
    real, deleted = fcntl.flock, []

    def flock(descriptor, how):
        if how == fcntl.LOCK_EX and not deleted:
            deleted.extend(tmp_path.iterdir())
            deleted[0].unlink()
        return real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with written_whole(tmp_path / "x") as aside:
        Path(aside).write_text("whole")
    assert deleted and (tmp_path / "x").read_text() == "whole" and os.listdir(tmp_path) == ["x"]


def test_threads_that_save_one_name_leave_a_whole_file_and_nothing_else(tmp_path):
    def save(letter):
        for _ in range(20):
            with written_whole(tmp_path / "x") as aside:
                Path(aside).write_text(letter * 10_000)

    threads = [threading.Thread(target=save, args=[letter]) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = (tmp_path / "x").read_text()
    assert os.listdir(tmp_path) == ["x"] and len(text) == 10_000 and len(set(text)) == 1


def test_logits_that_cannot_be_kept_are_a_warning(tmp_path, monkeypatch):
    reference = reference_logits.ReferenceLogits(hostile._model(), hostile.IDS, 4, 3)
    reference.get(4, lambda: mx.ones((3, 96)))
    reference._path.mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"\[ReferenceLogits\] .* cannot be written .* again next time"):
        reference.finish()


def test_killed_saves_leave_the_old_file_or_the_new_one():
    told = run_script("kill_saves.py", "--times", "10")
    assert told["old"] + told["new"] == told["killed"] == 10
    assert told["most_leftovers"] <= 1 and told["leftovers_after_a_last_save"] == 0

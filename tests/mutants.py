"""Put one error after the other into a copy of this checkout and see that a named test notices each.

    python tests/mutants.py             # all of them, one by one
    python tests/mutants.py --only 3,17

First the tests run without an error, and must pass. A mutant is killed if a test fails, if the process that tests dies,
or if it takes longer than the time limit; one that survives, cannot be imported or does not compile makes the exit
status 1. Ends with one line of JSON.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 180  # for one mutant, whose test takes 3 to 20


class Mutant(NamedTuple):
    """One wrong line.

    Attributes:
        error: what is wrong, in words.
        file: in the package, or in kernels/.
        old, new: text of the line, which stands once in the file, and what takes its place. Where equal lines are told
            apart by their neighbours, those are there too.
        test: that should notice, as pytest takes it behind "tests/test_".
    """

    error: str
    file: str
    old: str
    new: str
    test: str


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
_LITERAL = "lloyd_max.py::test_codes_and_scales_are_those_of_the_literal_definition"
CODEC = [
    Mutant("the largest product counts as the nearest direction", "ops/lloyd_max.py",
           " / mx.linalg.norm(chosen, axis=-1, keepdims=True)", "", _LITERAL),
    Mutant("a third scaling is compared with the second, not with the best", "ops/lloyd_max.py",
           "best = mx.maximum(fit, best)", "best = fit", _LITERAL),
    Mutant("Newton's method ends far too early", "codebook.py",
           "np.abs(step).max() < 1e-12", "np.abs(step).max() < 1e-2",
           "codebook.py::test_every_centroid_is_the_mean_of_its_cell"),
    Mutant("a last word that is not full is left out", "packing.py",
           "return -(-dim * width // 32)", "return dim * width // 32",
           "packing.py::test_words_per_row_follows_the_formula"),
    Mutant("a dense rotation keeps the signs that QR happens to give", "rotation.py",
           "(q * np.sign(np.diag(r)))", "q", "rotation.py::test_one_dimension_is_a_sign_and_both_occur"),
    Mutant("the square root in place of the fourth root", "conditioning.py",
           "log_s = 0.25 *", "log_s = 0.5 *", "conditioning.py::test_factors_are_the_minimiser_of_the_noise"),
    Mutant("a centre is divided by all rows, bad ones too", "conditioning.py",
           "/ mx.maximum(count, 1))", "/ block)", "conditioning.py::test_centers_are_means_over_finite_entries"),
    Mutant("what is subtracted is not what is stored", "conditioning.py",
           "mx.maximum(count, 1)).astype(keys.dtype)", "mx.maximum(count, 1))",
           "conditioning.py::test_centers_are_block_means_in_the_dtype_of_the_keys"),
    Mutant("moments of queries are balanced along one axis only", "quantizers/coded.py",
           "moments / (factors[..., None] * factors[:, :, None])", "moments / factors[..., None]",
           "quantizers.py::test_methods_learn_of_balanced_keys_and_of_what_queries_become_with_them"),
    Mutant("a path may start in any state", "ops/viterbi.py",
           "costs[0] = 0", "costs[:] = 0", "trellis.py::test_the_path_found_is_the_nearest_of_all"),
]  # fmt: skip
_PADDED = "ragged_batch.py::test_prompts_that_are_padded_on_the_right_leave_no_trace"
CACHE = [
    Mutant("a bounded cache goes back to where its sinks end", "cache/trimming.py",
           "kept <= cache.scheme.sinks and", "kept < cache.scheme.sinks and",
           "rewinds.py::test_a_batch_does_not_go_back_to_what_a_bound_dropped"),
    Mutant("a rewind undoes no encoding", "cache/trimming.py",
           "before[0] > cache.offset - n", "before[0] > cache.offset",
           "speculative.py::test_no_rewind_cuts_a_block_at_any_length_of_the_tail[]"),
    Mutant("what a rewind may undo outlives a drop", "cache/two_phase.py",
           "        self._undo = []  # it would bring back what is dropped now\n", "",
           "rewinds.py::test_what_a_bound_dropped_since_is_not_brought_back_by_a_rewind"),
    Mutant("keys learn from values and values from keys", "cache/two_phase.py",
           "zip(self._quantizers, raw, strict", "zip(self._quantizers, raw[::-1], strict",
           "methods.py::test_a_batch_is_its_sequences[turbo2.5]"),
    Mutant("a cache that is full drops one token too early", "cache/bound.py",
           "held + new <= max_size", "held + new < max_size",
           "bounded.py::test_a_large_bound_drops_a_sixteenth_at_once"),
    Mutant("a window reaches one token too far", "cache/bound.py",
           "queries < keys + window_size", "queries <= keys + window_size",
           "bounded.py::test_any_mixture_of_prompts_steps_and_trims_keeps_the_sinks_and_the_newest"),
    Mutant("plain steps go on when a block is due", "cache/schedule.py",
           "scheme.window + scheme.block - tail", "scheme.window + scheme.block - tail + 1",
           "plain_steps.py::test_steps_leave_the_same_cache_and_the_same_rows"),
    Mutant("plain steps go one token beyond the bound", "cache/plain_steps.py",
           "cache.max_size - cache.size()", "cache.max_size - cache.size() + 1",
           "plain_steps.py::test_steps_leave_the_same_cache_and_the_same_rows"),
    Mutant("queries of a prompt's chunk are counted again", "cache/query_moments.py",
           "newest, self._newest = self._newest, None", "newest = self._newest",
           "phases.py::test_each_query_of_a_prompt_weighs_once_whatever_the_chunks"),
    Mutant("only the last layer's bad rows are asked for", "cache/nonfinite.py",
           "self._seen += bad", "self._seen = list(bad)",
           "plain_steps.py::test_layers_that_encode_in_one_step_are_read_once"),
    Mutant("one query of the padding weighs too", "cache/query_moments.py",
           "mx.arange(L) < mx.array(counts)", "mx.arange(L) <= mx.array(counts)", _PADDED),
    Mutant("padding behind a prompt is encoded", "cache/ragged_compression.py",
           "tail = lengths[i].tail - self._beyond(i)", "tail = lengths[i].tail", _PADDED),
    Mutant("padding behind a prompt drops tokens", "cache/ragged_compression.py",
           "held = [tokens - self._beyond(i) for i,", "held = [tokens for i,", _PADDED),
    Mutant("who stays in a batch takes the place of who left it", "cache/ragged_batch.py",
           'for name in ("_fitted", ', "for name in (",
           "ragged_batch.py::test_those_who_stay_in_a_batch_are_what_they_were"),
    Mutant("a batch counts only the last drop", "cache/ragged_store.py",
           "self.dropped = [before + n for", "self.dropped = [n for",
           "ragged_batch.py::test_a_sequence_taken_out_is_the_cache_it_would_have_been"
           "[turbo4:block=16,window=4,sinks=2-60]"),
    Mutant("the token behind the sinks counts as a sink", "cache/ragged_mask.py",
           "mx.where(columns < sinks, 0, gaps)", "mx.where(columns <= sinks, 0, gaps)",
           "ragged_batch.py::test_the_mask_of_unequal_lengths"),
    Mutant("a warning of bad numbers is repeated", "cache/nonfinite.py",
           "self._seen = self._seen[len(ready) :]", "pass",
           "two_phase.py::test_a_bad_key_harms_only_its_own_entries_and_is_reported_with_its_layer"),
    Mutant("bytes of what was learned are not counted", "cache/held.py",
           "self._queries.sums, *self._learned()]", "self._queries.sums]",
           "planning.py::test_predicted_bytes_are_those_of_a_real_cache"),
    Mutant("the phases of a saved cache are exchanged", "cache/saved_state.py",
           "flags = (cache._chunk_ended, cache._trimmed", "flags = (cache._trimmed, cache._chunk_ended",
           "phases.py::test_a_restored_cache_takes_its_next_call_for_what_it_is"),
    Mutant("a file may have arrays of one layer too many", "cache/file_layout.py",
           "if layer >= len(kinds):", "if layer > len(kinds):",
           "hostile_files.py::test_states_that_are_no_cache_are_refused[no class]"),
    Mutant("arrays of a file may lie on each other", "files/safetensors.py",
           "if entry.start != end:", "if entry.start > end:",
           "hostile_files.py::test_headers_that_lie_are_refused[arrays on each other-prompt cache]"),
    Mutant("a file takes its name before it is on the disk", "files/written.py",
           "        _flush(aside)\n", "",
           "prompt_cache_file.py::test_the_file_is_flushed_before_it_takes_its_name"),
    Mutant("a header as long as is read may not be written", "prompt_cache_file.py",
           "if length > MAX_HEADER_BYTES:", "if length >= MAX_HEADER_BYTES:",
           "hostile_files.py::test_metadata_that_could_not_be_read_again_is_not_written"),
]  # fmt: skip
_EDGES, _COVER = "attend_edges.py::test_", "attend_kernel.py::test_kernels_agree_with_float64"
_LENGTHS = f"{_EDGES}each_sequence_has_its_own_lengths_and_none_gives_zero"
KERNELS = [
    Mutant("sums are written over queries that others still read", "attend.metal",
           f"  {BARRIER}  // the queries are dead", "  // the queries are dead", _LENGTHS),
    Mutant("a tile's weights are read before all are written", "attend.metal",
           "simdgroup_barrier(mem_flags::mem_threadgroup);\n  if (simd_any", "if (simd_any", _LENGTHS),
    Mutant("a query does not see its own token", "attend.metal",
           "int(token) > last ||", "int(token) >= last ||", _LENGTHS),
    Mutant("the last raw token counts twice", "attend.metal", "if (n >= raw) {", "if (n > raw) {", _LENGTHS),
    Mutant("as many raw rows as there are sinks are not read", "attend.metal",
           "raw = sinks + tail,", "raw = tail,", _LENGTHS),
    Mutant("a mask's columns forget the sinks", "attend.metal",
           "mask_row, sinks + token + i, last", "mask_row, token + i, last",
           f"{_EDGES}masks_may_be_shared_by_sequences_heads_and_queries"),
    Mutant("the sum of weights keeps the scale of an old maximum", "attend.metal",
           "part.total * shrink + sum", "part.total + sum", f"{_EDGES}scores_of_thousands_do_not_overflow"),
    Mutant("a head gets the sink logit of another", "attend.metal",
           "logits[kvh * G + (row0 + r) / L]", "logits[kvh * G + (row0 + r) % L]",
           f"{_COVER}[D=128,G=2,L=2,block=16,causal=True,logits=True]"),
    Mutant("keys are multiplied with the scale of another group", "attend.metal",
           "+ kfirst / KSPAN", "+ at.ksub / KSPAN",
           f"{_COVER}[value_bits=8,D=128,dtype=float32,G=2,block=16,group=8,balance=False,logits=True,"
           "lengths=((4,0,40),(4,2,17),(0,0,0))]"),
    Mutant("odd sizes are normalised twice", "rotation.h",
           "metal::rsqrt(float(TWO))", "metal::rsqrt(float(D))",
           f"{_COVER}[key_bits=2,value_bits=3,D=80,dtype=float32,G=2,L=2,block=256,causal=True,logits=True,"
           "lengths=((4,0,40),(4,2,17),(0,0,0))]"),
    Mutant("the first split of raw rows is turned back too", "attend_merge.metal",
           "s < uint(SPLITS - RAW)", "s <= uint(SPLITS - RAW)", f"{_EDGES}any_number_of_splits"),
    Mutant("splits' totals are read before all are written", "attend_merge.metal",
           f"totals[sg] = total; }}\n  {BARRIER}", "totals[sg] = total; }", f"{_EDGES}any_number_of_splits"),
    Mutant("a centre is subtracted while others still write it", "encode.metal",
           f"  {BARRIER}\n}}\n\n//", "}\n\n//", "encode.py::test_magnitude_does_not_matter"),
    Mutant("of a row only the first number is looked at", "encode.metal",
           "is_finite(y[e]) ? found", "is_finite(y[0]) ? found", "encode.py::test_one_bad_number_harms_no_other"),
    Mutant("rows behind the newest raw ones are kept too", "keep_rows.metal",
           "count > first ? count - first : 0u", "count", "keep_rows.py::test_rows_are_copied_to_the_bit"),
    Mutant("all groups of a row have the scale of the first", "dequantize.metal",
           "if (e == 0 || GROUP != D)", "if (e == 0)",
           "dequantize.py::test_rows_are_at_most_twice_as_far_from_float64_as_those_of_plain_mlx"
           "[D=80,bits=3,group=16,center=False-emulator]"),
    Mutant("the last block is as full as the others", "survey.metal",
           "min(uint(sizes[2]) - first, uint(BLOCK))", "uint(BLOCK)",
           "survey.py::test_squares_and_bad_rows_are_those_of_numpy"),
    Mutant("lanes beyond the head size count for the mean", "balance.metal",
           "mean += lane + 32 * uint(e) < uint(D) ? x[e] : 0.0f;", "mean += x[e];",
           "survey.py::test_the_balance_is_what_its_formula_says"),
    Mutant("the way back begins behind the end of a row", "trellis.metal",
           "uint count = min(16u, dim - 16 * chunk), word = 0;", "uint count = 16u, word = 0;",
           "trellis.py::test_the_kernel_finds_a_path_as_near_as_numpy_does"),
]  # fmt: skip
MUTANTS = CODEC + CACHE + KERNELS


def main() -> None:
    """Run the mutants that are asked for and tell."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--only", metavar="N,N", help="these alone, counted from 1")
    only, every = out.parse_args().only, range(1, len(MUTANTS) + 1)
    numbers = [n for n in every if only is None or str(n) in only.split(",")]
    if only is not None and len(numbers) < len(only.split(",")):
        out.error(f"--only takes numbers from 1 to {len(MUTANTS)}, got {only}")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(numbers, Path(folder).resolve()))


def run(numbers: list[int], folder: Path) -> int:
    """Copy the checkout into a folder and try mutants of these numbers; the exit status."""
    start, copy = time.monotonic(), folder / "copy"
    copy_checkout(copy)
    files = {n: path_of(MUTANTS[n - 1], copy) for n in numbers}
    environment = environment_for(copy, folder)
    check_what_is_imported(copy, environment)
    tests = list(dict.fromkeys(MUTANTS[n - 1].test for n in numbers))
    verdict, seconds, said = try_tests(tests, copy, environment, limit=900)
    if verdict != "survived":
        print(f"{said}\nThe tests do not pass as they stand ({verdict}).")
        return 1
    print(f"without an error: {len(tests)} tests pass, {seconds:.1f} s", flush=True)
    verdicts = {}
    for n, path in files.items():
        mutant, right, times = MUTANTS[n - 1], path.read_text(), path.stat()
        path.write_text(right.replace(mutant.old, mutant.new))
        os.utime(path, (n, n))  # compiled Python is told apart by size and second: each error has a second of its own
        verdict, seconds, said = try_tests([mutant.test], copy, environment, LIMIT_SECONDS)
        path.write_text(right)
        os.utime(path, (times.st_atime, times.st_mtime))
        verdicts[n] = verdict
        print(f"{n:3} {verdict}, {seconds:.1f} s: {mutant.file}: {mutant.error}", flush=True)
    bad = [n for n, verdict in verdicts.items() if not verdict.startswith("killed")]
    told = {"mutants": len(verdicts), "killed": len(verdicts) - len(bad), "not_killed": bad}
    print(json.dumps(told | {"seconds": round(time.monotonic() - start)}))
    return 1 if bad else 0


def copy_checkout(copy: Path) -> None:
    """Copy the files that git tracks, as they are now, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, dict.fromkeys(names)):
        if (ROOT / name).is_file():  # git lists a deleted one too
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def path_of(mutant: Mutant, copy: Path) -> Path:
    """The file that it changes.

    Raises:
        ValueError: if what it replaces does not stand there once.
    """
    path = copy / ("mlx_turboquant" if mutant.file.endswith(".py") else "kernels") / mutant.file
    count = path.read_text().count(mutant.old)
    if count != 1:
        raise ValueError(f"[mutants] wanted once in {mutant.file}, got {count} times: {mutant.old!r}. Write it anew.")
    return path


def environment_for(copy: Path, folder: Path) -> dict[str, str]:
    """Variables under which the copy is imported, and nothing of it is kept."""
    return {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"} | {
        "PYTHONPATH": str(copy),
        "XDG_CACHE_HOME": str(folder / "cache"),  # kernels with errors, built for the emulator
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }


def check_what_is_imported(copy: Path, environment: dict[str, str]) -> None:
    """Be sure that the copy's package and kernels are read, where this checkout is installed too."""
    program = "from mlx_turboquant import kernel_source as k; print(k.__file__, *filter(k.Path.is_dir, k._PLACES))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, env=environment, capture_output=True, check=True, text=True
    )
    expected = f"{copy / 'mlx_turboquant/kernel_source.py'} {copy / 'kernels'}"
    if done.stdout.strip() != expected:
        raise RuntimeError(f"[mutants] wanted {expected} to be read, got {done.stdout.strip()}. Install the checkout.")


def try_tests(tests: list[str], copy: Path, environment: dict[str, str], limit: float) -> tuple[str, float, str]:
    """Run tests in the copy up to the first that fails: the verdict, seconds, and what was printed."""
    shutil.rmtree(environment["HYPOTHESIS_STORAGE_DIRECTORY"], ignore_errors=True)  # what it found for another mutant
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    command += [f"tests/test_{test}" for test in tests]
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
        code, ran = process.returncode, re.search(r"^s*\.", said, re.MULTILINE)
        passed = "survived" if ran else "broken (its tests were skipped)"
        verdict = {0: passed, 1: "killed"}.get(code, f"broken (pytest ends with {code})")
        verdict = f"killed (process died, {code})" if code < 0 else verdict
        verdict = "broken (does not compile)" if re.search(r"^E +[\w.]*CompileError", said, re.MULTILINE) else verdict
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, verdict = process.communicate()[0], f"killed (time limit of {limit:.0f} s)"
    return verdict, time.monotonic() - start, said


if __name__ == "__main__":
    main()

"""Read spoiled files, one after the other, and tell which were not refused in one clear line.

    python tests/fuzz_files.py --seconds 600          # as many as that takes, on one core
    python tests/fuzz_files.py --case 0:1234          # one of them again, with its traceback
    python tests/fuzz_files.py --case 0:1234 --write bad.safetensors

Each file follows from the seed and its number. A process of its own reads them, so that a crash or a hang ends that
process, is told with the case's number, and the next process goes on behind it.
"""

import argparse
import collections
import faulthandler
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

HANGS_AFTER_SECONDS = 20


def main() -> None:
    """Run cases, or one of them."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--seconds", type=float, default=60, help="how long (60)")
    out.add_argument("--seed", type=int, default=0, help="of all cases (0)")
    out.add_argument("--case", metavar="SEED:NUMBER", help="this one alone")
    out.add_argument("--write", type=Path, help="with --case: write the file here and do not read it")
    out.add_argument("--worker", nargs=2, metavar=("FIRST", "FOLDER"), help=argparse.SUPPRESS)
    args = out.parse_args()
    if args.case:
        _one(*map(int, args.case.split(":")), args.write)
    elif args.worker:
        _work(args.seed, int(args.worker[0]), Path(args.worker[1]), args.seconds)
    else:
        sys.exit(_watch(args.seed, args.seconds))


def _one(seed: int, number: int, write: Path | None) -> None:
    import hostile

    name, data = hostile.spoiled_case(seed, number)
    if write is not None:
        write.write_bytes(data)
        return
    with tempfile.TemporaryDirectory() as folder:
        hostile.own_cache_folder(folder)
        path = Path(folder) / f"case{hostile.READERS[name].suffix}"
        path.write_bytes(data)
        print(f"{name}, {len(data):,} bytes: {hostile.verdict(hostile.READERS[name], path) or 'as it should be'}")
        path.write_bytes(data)
        hostile.READERS[name].read(path)


def _work(seed: int, first: int, folder: Path, seconds: float) -> None:
    """Read cases from `first` on; one line of JSON for each that is wrong, and one at the end."""
    import hostile

    hostile.own_cache_folder(folder)
    for reader in hostile.READERS.values():  # what is made once counts for no case
        path = folder / f"whole{reader.suffix}"
        path.write_bytes(reader.whole())
        if wrong := hostile.verdict(reader, path):
            print(json.dumps({"case": "whole", "reader": reader.suffix, "wrong": wrong}), flush=True)
    end, number, read = time.monotonic() + seconds, first, collections.Counter()
    while time.monotonic() < end:
        (folder / "number").write_text(str(number))
        faulthandler.dump_traceback_later(HANGS_AFTER_SECONDS, exit=True)
        name, data = hostile.spoiled_case(seed, number)
        path = folder / f"case{hostile.READERS[name].suffix}"
        path.write_bytes(data)
        if wrong := hostile.verdict(hostile.READERS[name], path):
            print(json.dumps({"case": f"{seed}:{number}", "reader": name, "wrong": wrong}), flush=True)
        path.unlink(missing_ok=True)
        read[name] += 1
        number += 1
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"read": read}), flush=True)


def _watch(seed: int, seconds: float) -> int:
    """Start workers until the time is over; the number of cases that went wrong, at most 100."""
    end, first, wrong, read = time.monotonic() + seconds, 0, 0, collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        while (left := end - time.monotonic()) > 1:
            command = [sys.executable, __file__, "--seed", str(seed), "--seconds", str(left), "--worker", str(first)]
            done = subprocess.run([*command, folder], capture_output=True, text=True)
            for line in done.stdout.splitlines():
                told = json.loads(line)
                if "read" in told:
                    read.update(told["read"])
                else:
                    wrong += 1
                    print(line, flush=True)
            if done.returncode == 0:
                break
            last = Path(folder) / "number"
            number = int(last.read_text()) if last.exists() else first
            wrong += 1
            print(
                json.dumps({"case": f"{seed}:{number}", "exit": done.returncode, "said": done.stderr[-1500:]}),
                flush=True,
            )
            first = number + 1
    print(json.dumps({"read": read, "in_all": sum(read.values()), "wrong": wrong}))
    return min(wrong, 100)


if __name__ == "__main__":
    main()

"""Fuzzes all readers: `python -m tests.fuzz --count 20000`.

Prints a line for each reader, then each fault. The exit code is 1 if there is one.
"""

import argparse
import faulthandler
import os
import sys
import tempfile
from pathlib import Path

from tests.fuzz.harness import fuzz
from tests.fuzz.tables import TABLES

MAX_ADDRESS_SPACE = 16 << 30  # bytes, most of which JAX reserves without using them


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="files of all readers of a table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", choices=TABLES, action="append", help="default: all")
    args = parser.parse_args()
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    faults = []
    for name in args.table or TABLES:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            targets = TABLES[name](Path(folder))
            for target in targets:
                faulthandler.dump_traceback_later(1800, exit=True)
                result = fuzz(target, -(-args.count // len(targets)), seed=args.seed)
                print(
                    f"{name} {result.name}: {result.read} read, {result.refused} refused, "
                    f"{len(result.faults)} faults, at most {result.seconds:.2f} s and "
                    f"{result.memory >> 20} MiB",
                    flush=True,
                )
                faults += result.faults
            if Path("canary").exists() or "antigravity" in sys.modules:
                faults.append(f"{name}: an attack ran")
            os.chdir("/")
    faulthandler.cancel_dump_traceback_later()
    print(*faults, f"{len(faults)} faults", sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

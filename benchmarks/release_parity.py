"""Compares the quickstart under two Python environments, which hold other releases of Megatron-Core.

    python -m benchmarks.release_parity OLD/bin/python NEW/bin/python

runs the quickstart whole with each, and once more with the old one on a single rank. Exits with 1 unless the first
three steps are equal to 4 digits, and the next seven differ by no more than that, or than one rank and two differ.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

EXACT, COMPARED = 3, 10
"""Steps that have to be equal, and steps that are compared."""
DIGITS = 1e-4


def run(python: str, folder: Path, *overrides: str) -> list[dict[str, float]]:
    """The metrics of each step of the quickstart, without times."""
    command = [python, "-m", "echorl_nemo", "quickstart", f"trainer.run_dir={folder}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in row.items() if _is_compared(name, value)} for row in rows if row["step"] >= 0
    ]


def difference(ours: dict[str, float], theirs: dict[str, float]) -> tuple[float, str]:
    """The largest relative difference of two steps' metrics, and its name. Values below .001 count as .001."""
    if ours.keys() != theirs.keys():
        return float("inf"), ", ".join(sorted(ours.keys() ^ theirs.keys()))
    return max((abs(ours[name] - theirs[name]) / max(abs(ours[name]), abs(theirs[name]), 1e-3), name) for name in ours)


def _is_compared(name: str, value: Any) -> bool:
    # the gaps are roundoff themselves
    return isinstance(value, (int, float)) and not name.startswith(("time.", "tokens_per_second", "rollout."))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old = run(options.old, Path(folder) / "old")
        new = run(options.new, Path(folder) / "new")
        one = run(options.old, Path(folder) / "one", "parallel.tensor=1")
    wrong = len(old) != len(new)
    print(f"{'step':>4}  {'old against new':<40}  one rank against two (old)")
    for step in range(min(COMPARED, len(old))):
        between, scatter = difference(old[step], new[step]), difference(old[step], one[step])
        allowed = DIGITS if step < EXACT else max(DIGITS, scatter[0])
        wrong |= not between[0] <= allowed
        print(f"{step + 1:>4}  {f'{between[0]:.1e} {between[1]}':<40}  {scatter[0]:.1e} {scatter[1]}")
    print("NOT EQUAL" if wrong else "equal")
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())

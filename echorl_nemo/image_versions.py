"""Whether a container image holds the releases that the Dockerfile expects of it.

    python -m echorl_nemo.image_versions megatron-core=0.18 megatron-bridge=0.5

It ends with 1, and a line for each package that is missing or of another release. Standard library only, since it runs
in images where nothing of this package's needs is installed.
"""

import importlib.metadata
import sys
from collections.abc import Sequence


def mismatches(expected: Sequence[str]) -> list[str]:
    """A line for each of ``expected``, `PACKAGE=RELEASE`, that is not installed in that release. ``0.18`` stands for
    every 0.18.x. Raises ValueError for an entry of another form."""
    found = []
    for entry in expected:
        package, separator, wanted = entry.partition("=")
        if not (package and separator and wanted):
            raise ValueError(f"{entry!r} is not PACKAGE=RELEASE, like megatron-core=0.18")
        try:
            release = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} is not in this image, and {wanted} is expected; name another image")
            continue
        if f"{release}.".startswith(f"{wanted}.") or f"{release}+".startswith(f"{wanted}+"):
            continue
        found.append(f"{package} is {release} in this image, and {wanted} is expected; name another image")
    return found


def main() -> int:
    """Check the releases that the arguments name."""
    try:
        lines = mismatches(sys.argv[1:])
    except ValueError as error:
        lines = [str(error)]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The layers of docs/architecture.md hold for every import of the package, wherever it stands."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "echorl_nemo"
TORCH_ONLY = ("echo", "grpo", "ops")


def allowed() -> dict[str, set[str]]:
    """The table of docs/architecture.md: what each part may import."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| part | may import |") : text.index("Beside the package")]
    rows = re.findall(r"^\| `([\w.]+)` \|(.*)\|$", table, re.MULTILINE)
    return {part: set(re.findall(r"`([\w.]+)`", cell)) for part, cell in rows}


ALLOWED = allowed()


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without the package's own."""
    found = {}
    for path in sorted((REPOSITORY / PACKAGE).rglob("*.py")):
        parts = path.relative_to(REPOSITORY / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(source: str) -> Iterator[str]:
    """Dotted names of every import in ``source``, those inside functions and conditions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix(f"{PACKAGE}.") in MODULES else str(node.module)


def part_of(module: str) -> str:
    """The most specific part of the table that holds ``module``; empty if none does."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in ALLOWED), "")


def violations(module: str, source: str) -> list[str]:
    """A sentence about each import of ``module`` that its row does not allow."""
    own, found = part_of(module), []
    for name in imports(source):
        top, _, inside = name.partition(".")
        if top == PACKAGE and inside:
            target = part_of(inside)
            if target not in {own, *ALLOWED[own]}:
                found.append(f"{module} imports {inside}: {own} may not import {target or inside}")
        elif module.split(".")[0] in TORCH_ONLY and top not in {"torch", "triton", *sys.stdlib_module_names}:
            found.append(f"{module} imports {name}: {own} imports only torch and triton")
    return found


def test_every_module_belongs_to_a_part() -> None:
    assert [module for module in MODULES if module not in ("", "engines") and not part_of(module)] == []


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_a_module_imports_what_its_part_may(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "planted", "message"),
    [
        ("resilience.stop", "from echorl_nemo.rollout.batch import RolloutBatch", "resilience may not import rollout"),
        ("echo.clips", "def f():\n    from echorl_nemo.grpo import kl", "echo may not import grpo"),
        ("ops.ranges", "import numpy", "ops imports only torch"),
        (
            "engines.nemo_rl.loss",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import echorl_nemo.engines.megatron.policy",
            "engines.nemo_rl may not import engines.megatron",
        ),
        ("engines.megatron.policy", "from echorl_nemo.checks import run", "engines.megatron may not import checks"),
    ],
)
def test_a_planted_import_is_found(module: str, planted: str, message: str) -> None:
    (found,) = violations(module, planted)
    assert message in found


def test_the_table_has_no_circle() -> None:
    left = {part: targets - {part} for part, targets in ALLOWED.items()}
    while ready := [part for part, targets in left.items() if not targets & left.keys()]:
        for part in ready:
            del left[part]
    assert left == {}


def test_no_module_imports_itself_in_a_circle() -> None:
    names = {module for module in MODULES if module}
    graph = {
        module: {
            inside
            for name in imports(MODULES[module].read_text(encoding="utf-8"))
            if (inside := name.removeprefix(f"{PACKAGE}.")) in names and inside != module
        }
        for module in names
    }
    while ready := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in ready:
            del graph[module]
    assert sorted(graph) == []


def test_the_schema_needs_no_heavy_package() -> None:
    code = (
        "import sys, echorl_nemo.schema\n"
        "print(sorted({'torch', 'transformers', 'megatron', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "[]\n"

"""Who may import whom, and what a command line may load before it works."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "mae", "segmenter", "pipeline", "benchmark.py")
# By room: the modules of the project that it may import, beside its own; and whether torch.
MAY_IMPORT = {
    "common": ((), True),
    "mae": (("common",), True),
    "segmenter": (("common",), True),
    "pipeline": (("common",), False),
    "benchmark.py": (("common", "pipeline"), False),
}
WITH_TORCH = {
    "common.checkpoint", "common.devices", "common.gpus", "common.layers", "common.memory",
    "common.training", "common.update",
}  # fmt: skip


def module_of(source: Path) -> str:
    parts = list(source.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources_of(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


MODULES = {module_of(source): source for room in ROOMS for source in sources_of(room)}


def imported(source: Path, *, for_types: bool = True) -> set[str]:
    """Modules that a file imports, inside functions too; those of the project by their full name.

    for_types: also those that only a type checker imports (`if TYPE_CHECKING`).
    """
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found, unread = set(), list(ast.iter_child_nodes(tree))
    while unread:
        node = unread.pop()
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if guarded and not for_types:
            continue
        unread += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_design_allows(room: str) -> None:
    allowed, with_torch = MAY_IMPORT[room]
    own = room.removesuffix(".py")
    offenders = {}
    for source in sources_of(room):
        for name in imported(source):
            top = name.partition(".")[0]
            is_strange = name in MODULES and top not in (own, *allowed)
            needs_torch = not with_torch and (top in ("torch", "accelerate") or name in WITH_TORCH)
            if is_strange or needs_torch:
                offenders.setdefault(str(source.relative_to(ROOT)), set()).add(name)
    assert sources_of(room)
    assert offenders == {}


def test_only_the_files_that_say_so_need_torch() -> None:
    found = {
        module
        for module, source in MODULES.items()
        if module.startswith("common.") and "torch" in imported(source, for_types=False)
    }
    assert found == WITH_TORCH


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Function-level imports included: they hide a circle, they do not break it."""
    needs = {
        module: {name for name in imported(source, for_types=False) if name in MODULES} - {module}
        for module, source in MODULES.items()
    }
    left = None
    while left != needs:  # take away what imports nothing of the rest, and what it does not import
        left, imported_ones = needs, set().union(*needs.values())
        kept = {module for module, needed in needs.items() if needed and module in imported_ones}
        needs = {module: needs[module] & kept for module in kept}
    assert needs == {}


def test_importing_benchmark_loads_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "matplotlib", "PIL", "submitit", "pycocotools", "jinja2", "rich"]
    program = f"import benchmark, sys; print([n for n in {heavy} if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_the_file_to_read_first_is_short() -> None:
    assert len((ROOT / "benchmark.py").read_text(encoding="utf-8").splitlines()) <= 250

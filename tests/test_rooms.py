"""Who may import whom, and what a command line may load before it works."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "engine", "segments", "mae", "segmenter", "pipeline", "benchmark.py")
# What the planner may know of the parts: it is free of torch.
FREE_OF_TORCH = (
    "segments.config", "segments.check", "mae.config", "mae.check", "mae.masking",
    "segmenter.config", "segmenter.check",
)  # fmt: skip
# By room: the rooms, or modules, of the project that it may import beside its own.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "common": (),
    "engine": ("common",),
    "segments": ("common",),
    "mae": ("engine", "common", "segments"),
    "segmenter": ("engine", "common"),
    "pipeline": ("common", *FREE_OF_TORCH),
    "benchmark.py": ("common", "pipeline", *FREE_OF_TORCH),
}
WITHOUT_TORCH = ("common", "pipeline", "benchmark.py")
# Inside the pipeline: the plan lies below what runs it and what tells of it.
MAY_IMPORT_WITHIN = {"plan": (), "report": ("plan",), "launch": ("plan", "report")}


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


def is_within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_design_allows(room: str) -> None:
    own, offenders = room.removesuffix(".py"), {}
    for source in sources_of(room):
        for name in imported(source):
            is_strange = name in MODULES and not is_within(name, (own, *MAY_IMPORT[room]))
            needs_torch = room in WITHOUT_TORCH and is_within(name, ("torch", "accelerate"))
            if is_strange or needs_torch:
                offenders.setdefault(str(source.relative_to(ROOT)), set()).add(name)
    assert sources_of(room)
    assert offenders == {}


@pytest.mark.parametrize("floor", MAY_IMPORT_WITHIN)
def test_the_plan_knows_neither_who_runs_it_nor_who_tells_of_it(floor: str) -> None:
    allowed = tuple(f"pipeline.{name}" for name in (floor, *MAY_IMPORT_WITHIN[floor]))
    offenders = {
        str(source.relative_to(ROOT)): strange
        for source in sources_of(f"pipeline/{floor}")
        if (strange := {n for n in imported(source) if is_within(n, ("pipeline",))
                        and not is_within(n, allowed)})
    }  # fmt: skip
    assert offenders == {}


def test_what_the_planner_imports_of_the_parts_loads_no_torch() -> None:
    program = f"import sys, {', '.join(FREE_OF_TORCH)}; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


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
    heavy = ["torch", "matplotlib", "PIL", "submitit", "pycocotools", "jinja2", "rich"]
    program = f"import benchmark, sys; print([n for n in {heavy} if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_the_file_to_read_first_is_short() -> None:
    assert len((ROOT / "benchmark.py").read_text(encoding="utf-8").splitlines()) <= 250

"""The order of the folders: none imports one above it (tacq_export/README.md)."""

import ast
from pathlib import Path

import pytest

import tacq_export

PACKAGE = Path(tacq_export.__file__).parent
# From the bottom to the top. A module may import from its own line and from those above it in this list.
ORDER = [
    {"errors", "reporting"},
    {"files"},
    {"format"},
    {"config"},
    {"runtime"},
    {"inputs"},
    {"calibration"},
    {"planning"},
    {"workdir"},
    {"quantization"},
    {"pipeline"},
    {"evaluation"},
    {"console"},
    {"cli_options"},
    {"cli"},
    {"__main__", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """Folder of a module, or its own name if it lies at the top."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported_parts(source: str, depth: int) -> set[str]:
    """Folders and top modules of the package that `source` imports. depth: 0 for a module at the top of it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            steps = (node.module or "").split(".") if node.module else []
            if node.level == depth + 1:  # from the package itself
                found |= {steps[0]} if steps else {alias.name for alias in node.names}
            elif node.level == 0 and steps[:1] == ["tacq_export"]:
                found |= {steps[1]} if len(steps) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {n.split(".")[1] for a in node.names if (n := a.name).startswith("tacq_export.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_imports_one_above_it(path):
    mine = part(path)
    imports = imported_parts(path.read_text(), len(path.relative_to(PACKAGE).parts) - 1)
    above = sorted(name for name in imports if RANK[name] > RANK[mine])
    assert not above, f"{path.relative_to(PACKAGE)} imports {', '.join(above)}, which lies above it"


def test_every_module_has_its_place():
    assert {part(path) for path in MODULES} == set(RANK)


def test_an_import_that_is_turned_round_is_found():
    assert imported_parts("from ..evaluation.verify import compare_models", 1) == {"evaluation"}
    assert imported_parts("def f():\n    from .pipeline import export", 0) == {"pipeline"}
    assert imported_parts("import tacq_export.cli\nfrom tacq_export import console", 1) == {"cli", "console"}
    assert imported_parts("from .tensor_types import TYPES", 1) == set()
    assert RANK["format"] < RANK["runtime"] < RANK["inputs"] < RANK["calibration"] < RANK["planning"]
    assert RANK["planning"] < RANK["quantization"] < RANK["pipeline"] < RANK["evaluation"]

"""The house: imports run one way, and no command is imported by a module."""

import ast

import pytest
from conftest import ROOT

COMMANDS = ("acgan", "generate", "evaluate", "train_judge")
# each floor may import those before it, and itself
FLOORS = [
    ("before_torch", "utils", "models"),
    ("departures",),
    ("data",),
    ("fast",),
    ("run",),
    ("evaluation",),
    COMMANDS,
]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
               if path.parent.name not in ("tests", "benchmarks", ".venv"))  # fmt: skip


def imported(path) -> set[str]:
    """The top-level names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    name = path.parts[0].removesuffix(".py")
    for other in (imported(path) & FLOOR_OF.keys()) - ({name} if len(path.parts) > 1 else set()):
        assert FLOOR_OF[other] < FLOOR_OF[name], f"{path} imports {other}"
        assert other not in COMMANDS


def test_models_needs_torch_alone():
    assert imported("models.py") == {"torch"}

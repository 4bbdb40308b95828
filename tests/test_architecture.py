"""The house rules that a reader relies on: imports go down, heavy dependencies have one door."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lens_safety as ls

PACKAGE = Path(ls.__file__).parent
LEVELS = {
    **dict.fromkeys(["types"], 0),
    **dict.fromkeys(["intervals", "metrics", "files", "progress", "wheels", "prompts", "public_sets"], 1),
    **dict.fromkeys(["operators", "show"], 1),
    **dict.fromkeys(["models"], 2),
    **dict.fromkeys(["tokens", "store"], 3),
    **dict.fromkeys(["residuals", "passes", "kv_cache", "decoding"], 4),
    **dict.fromkeys(["directions"], 5),
    **dict.fromkeys(
        ["separation", "scorers", "detect", "plans", "steer", "exchange", "attribute", "moments"], 6
    ),
    **dict.fromkeys(["evaluate", "baselines", "audit", "responses", "sweep", "guard", "readings"], 7),
    **dict.fromkeys(["plots", "findings", "report", "study", "doctor"], 8),
    **dict.fromkeys(["cli", "dashboard", "explore", "session"], 9),
}
BESIDE = {
    "decoding": {"kv_cache"},
    "passes": {"kv_cache"},
    "residuals": {"passes"},
    "metrics": {"files", "progress", "intervals"},
    "prompts": {"files", "progress", "public_sets", "show"},
    "public_sets": {"files"},
    "show": {"intervals"},
    "wheels": {"files"},
    "detect": {"scorers"},
    "steer": {"plans"},
    "baselines": {"evaluate"},
    "audit": {"evaluate", "baselines"},
    "sweep": {"baselines", "responses"},
    "report": {"findings", "plots"},
    "study": {"report", "plots"},
    "cli": {"dashboard"},
}
DOORS = {
    "transformer_lens": {"models"},
    "transformers": {"models"},
    "plotly": {"plots"},
    "circuitsvis": {"plots"},
    "streamlit": {"dashboard"},
    "ipywidgets": {"explore"},
    "analyses": set(),
    "examples": set(),
}
INSIDE_FUNCTIONS_ONLY = {"transformer_lens", "transformers", "sklearn", "scipy", "circuitsvis"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms() -> list[tuple[str, ast.Module]]:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    return [(room_of(path), in_its_room(path)) for path in files]


def in_its_room(path: Path) -> ast.Module:
    """The file's tree; relative imports in a folder are written as seen from the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = len(path.relative_to(PACKAGE).parts) - 1
    for node in ast.walk(tree):
        if inside and isinstance(node, ast.ImportFrom) and node.level == 1:
            node.module = ".".join([room_of(path), *filter(None, [node.module])])
        elif inside and isinstance(node, ast.ImportFrom) and node.level == 2:
            node.level = 1
    return tree


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imported modules, relative ones as `lens_safety.room`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in (None, "lens_safety"):
            yield from (f"lens_safety.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"lens_safety.{node.module}" if node.level else str(node.module)


def own(tree: ast.AST) -> set[str]:
    return {name.split(".")[1] for name in imports(tree) if name.startswith("lens_safety.")}


def upward(room: str, tree: ast.AST) -> set[str]:
    """What `room` imports that is no room below it; the door counts as above every room."""
    level, beside = LEVELS[room], BESIDE.get(room, set())
    found = own(tree) - {room}
    return {other for other in found if LEVELS.get(other, 10) >= level and other not in beside}


def wrong_doors(room: str, tree: ast.AST) -> set[str]:
    return {
        top
        for top in (name.split(".")[0] for name in imports(tree))
        if top in DOORS and room not in DOORS[top]
    }


def at_import(tree: ast.AST) -> set[str]:
    """Top-level packages that are imported as soon as the module is."""
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    now = [node for node in ast.walk(tree) if id(node) not in deferred]
    found = [imports(n) for n in now if isinstance(n, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for names in found for name in names}


def test_every_file_of_the_package_has_a_level():
    assert {room for room, _ in rooms()} <= set(LEVELS)


@pytest.mark.parametrize(("room", "tree"), rooms(), ids=[room for room, _ in rooms()])
def test_imports_go_down_only(room: str, tree: ast.Module):
    assert upward(room, tree) == set()


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("types", "from .cli import main"),
        ("models", "from . import tokens as tok"),
        ("detect", "def f():\n    from lens_safety.steer import steering"),
        ("files", "import lens_safety.prompts"),
        ("operators", "from .models import resid_hook"),
        ("decoding", "from .plans import SteeringPlan"),
        ("plans", "from .steer import steering"),
        ("plots", "from lens_safety import study"),
        ("cli", "from lens_safety import Detector"),
    ],
)
def test_an_upward_import_is_seen(room: str, line: str):
    assert len(upward(room, ast.parse(line))) == 1


def test_the_four_uses_of_a_direction_never_import_each_other():
    uses = [{"separation"}, {"detect", "scorers"}, {"plans", "steer"}, {"attribute"}]
    trees = [(room, tree) for room, tree in rooms() if room in set.union(*uses)]
    assert len(trees) >= 5
    for room, tree in trees:
        others = set.union(*(use for use in uses if room not in use))
        assert own(tree) & others == set()


@pytest.mark.parametrize(("room", "tree"), rooms(), ids=[room for room, _ in rooms()])
def test_heavy_dependencies_have_one_door(room: str, tree: ast.Module):
    assert wrong_doors(room, tree) == set()
    assert at_import(tree) & INSIDE_FUNCTIONS_ONLY == set()


def test_a_second_door_is_seen():
    assert wrong_doors("steer", ast.parse("def f():\n    import plotly.express as px")) == {"plotly"}
    assert wrong_doors("cli", ast.parse("from analyses import layers")) == {"analyses"}
    assert at_import(ast.parse("if True:\n    import transformers")) == {"transformers"}
    assert at_import(ast.parse("def f():\n    import transformers")) == set()


@pytest.mark.parametrize(
    "what",
    [
        "import lens_safety",
        "from lens_safety.cli import app; app(['detect', '--help'], standalone_mode=False)",
    ],
)
def test_neither_the_package_nor_its_help_loads_a_heavy_library(what: str):
    heavy = ["transformer_lens", "transformers", "sklearn", "plotly", "scipy", "circuitsvis"]
    heavy += ["torch", "pandas", "numpy", "jaxtyping"]
    script = f"import sys; {what}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_everything_in_all_exists_and_is_explained():
    assert len(ls.__all__) == len(set(ls.__all__))
    for name in ls.__all__:
        explained = getattr(ls, name).__doc__ or ""
        assert explained.strip(), name
        # A dataclass without a docstring is given its signature for one.
        assert not explained.startswith(f"{name}("), name


def test_everything_that_the_door_shows_is_in_all():
    door = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    shown = {
        alias.asname or alias.name
        for node in ast.walk(door)
        if isinstance(node, ast.ImportFrom) and node.level > 0
        for alias in node.names
    }
    assert shown == set(ls.__all__) == set(dir(ls))
    with pytest.raises(AttributeError, match="has no attribute 'tensor_core'"):
        _ = ls.tensor_core  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(set(LEVELS) & set(ls.__all__) - {"operators", "plots"}))
def test_a_name_of_a_room_and_its_function_stays_the_function(name: str):
    importlib.import_module(f"lens_safety.{name}")
    assert callable(getattr(ls, name))

"""The plan of the house, checked on the syntax trees: who may import whom, and what stays visible in the script."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # imports go down this table: never up, never sideways between rooms of a floor
    ("models", "data", "losses", "runtime"),
    ("evaluation", "training"),
    ("reporting",),
    ("commands",),
    ("train_ultimate",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
OWED = {  # imports that were there before the plan, each to go
    "models/__init__.py", "training/setup.py", "evaluation/predictor.py", "reporting/history.py",
    "reporting/listeners.py", "runtime/console.py",
}  # fmt: skip
BESIDE_THE_PROGRAM = {"tests", "benchmarks", "docs"}


def modules(root: Path = ROOT) -> list[Path]:
    """Source files of every room."""
    return [*root.glob("*.py"), *(path for room in FLOOR_OF for path in (root / room).glob("**/*.py"))]


def name_of(path: Path, root: Path = ROOT) -> str:
    """Dotted name of a module; a package goes by its folder's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, those inside functions and of submodules included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_imports(path: Path, root: Path = ROOT) -> list[str]:
    """Imports of a file that go up, or sideways to another room of its floor."""
    room = room_of(name_of(path, root))
    return [
        name
        for name in imports(path)
        if room_of(name) in FLOOR_OF and room_of(name) != room and FLOOR_OF[room_of(name)] >= FLOOR_OF[room]
    ]


def circle(root: Path = ROOT) -> list[str]:
    """Modules that import each other in a circle, imports inside functions included; empty if there is none."""
    known = {name_of(path, root): path for path in modules(root)}
    edges = {
        module: {name if name in known else name.rpartition(".")[0] for name in imports(path)} & known.keys() - {module}
        for module, path in known.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for other in sorted(edges[module]):
            if found := visit(other, [*trail, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(known) if (found := visit(module, []))), [])


def test_every_room_has_a_floor() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["losses.py", "train_ultimate.py"]
    packages = {path.parent.name for path in ROOT.glob("*/*.py")} - BESIDE_THE_PROGRAM
    assert packages | {"losses", "train_ultimate"} == set(FLOOR_OF)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    if str(path.relative_to(ROOT)) in OWED:
        pytest.xfail("owed")
    assert forbidden_imports(path) == []


@pytest.mark.xfail(bool(OWED), reason="owed", strict=True)
def test_no_circle() -> None:
    assert circle() == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("runtime/log.py", "from training.state import TrainState"),  # up
        ("models/network.py", "from data.layouts import Pair"),  # sideways
        ("training/window.py", "import evaluation.metrics"),  # sideways
        ("reporting/page.py", "from commands.report import report"),  # up
    ],
)
@pytest.mark.parametrize("inside_a_function", [False, True])
def test_an_import_up_or_sideways_is_found(tmp_path: Path, file: str, line: str, inside_a_function: bool) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(f"def f():\n    {line}\n" if inside_a_function else f"{line}\n")
    assert len(forbidden_imports(path, tmp_path)) == 1


def test_a_circle_inside_a_room_is_found(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "first.py").write_text("from data.second import f\n")
    (tmp_path / "data" / "second.py").write_text("def f():\n    from data import first\n")
    assert circle(tmp_path) == ["data.first", "data.second", "data.first"]


@pytest.mark.xfail(bool(OWED), reason="owed", strict=False)
@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_commands_see_the_command_line(path: Path) -> None:
    if room_of(name_of(path)) not in ("commands", "train_ultimate"):
        assert "argparse" not in {room_of(name) for name in imports(path)}


def test_timm_is_imported_in_one_place() -> None:
    assert [path.name for path in modules() if "timm" in {room_of(name) for name in imports(path)}] == ["backbone.py"]


def test_runtime_knows_no_image_and_no_network() -> None:
    for path in (ROOT / "runtime").glob("*.py"):
        assert not {room_of(name) for name in imports(path)} & {"timm", "torchvision", "PIL"}, path.name


def test_the_step_stays_visible_in_train_epoch() -> None:
    tree = ast.parse((ROOT / "train_ultimate.py").read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    loop = ast.unparse(functions["train_epoch"])
    for step in ("unscale_", "gradient_norm", "clip_grads_with_norm_", "gated_step", "scaler.update"):
        assert step in loop, f"{step} is hidden from train_epoch()"

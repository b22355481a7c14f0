"""The plan of the house, checked on the syntax trees: imports, output, size, and tests that hand parts in."""

import ast
import dataclasses
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from training.run import Run

FLOORS = (  # imports go down this table: never up, never sideways between rooms of a floor
    ("models", "data", "losses", "runtime"),
    ("evaluation", "training"),
    ("reporting",),
    ("commands",),
    ("train_ultimate",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
BESIDE_THE_PROGRAM = {"tests", "benchmarks", "docs"}


def modules(root: Path = ROOT) -> list[Path]:
    """Return the source files of all rooms."""
    return [*root.glob("*.py"), *(path for room in FLOOR_OF for path in (root / room).glob("**/*.py"))]


def name_of(path: Path, root: Path = ROOT) -> str:
    """Return a module's dotted name; a package has its folder's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names of a file's imports, including submodules and imports inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_imports(path: Path, root: Path = ROOT) -> list[str]:
    """Return the imports of a file that go up, or sideways to another room of its floor."""
    room = room_of(name_of(path, root))
    return [
        name
        for name in imports(path)
        if room_of(name) in FLOOR_OF and room_of(name) != room and FLOOR_OF[room_of(name)] >= FLOOR_OF[room]
    ]


def circle(root: Path = ROOT) -> list[str]:
    """Return modules that import each other in a circle, imports inside functions included; [] if there is none."""
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


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_room_has_a_floor() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["losses.py", "train_ultimate.py"]
    packages = {path.parent.name for path in ROOT.glob("*/*.py")} - BESIDE_THE_PROGRAM
    assert packages | {"losses", "train_ultimate"} == set(FLOOR_OF)


@pytest.mark.parametrize("path", modules(), ids=label)
def test_imports_go_down(path: Path) -> None:
    assert forbidden_imports(path) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
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


@pytest.mark.parametrize("path", modules(), ids=label)
def test_only_commands_know_argparse(path: Path) -> None:
    if room_of(name_of(path)) != "commands":
        assert "argparse" not in {room_of(name) for name in imports(path)}


def calls(path: Path, function: str) -> list[int]:
    """Return the lines of a file that call a function by its name."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function
    ]


@pytest.mark.parametrize("path", modules(), ids=label)
def test_only_output_and_console_print(path: Path) -> None:
    """Other modules log, or return lines."""
    if label(path) not in ("commands/output.py", "runtime/console.py"):
        assert calls(path, "print") == []


def test_timm_is_imported_in_one_place() -> None:
    assert [path.name for path in modules() if "timm" in {room_of(name) for name in imports(path)}] == ["backbone.py"]


def test_runtime_knows_no_image_and_no_network() -> None:
    for path in (ROOT / "runtime").glob("*.py"):
        assert not {room_of(name) for name in imports(path)} & {"timm", "torchvision", "PIL"}, path.name


def function(path: Path, name: str) -> ast.FunctionDef:
    tree = ast.parse(path.read_text())
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def test_the_step_stays_visible_in_train_epoch() -> None:
    loop = ast.unparse(function(ROOT / "train_ultimate.py", "train_epoch"))
    for step in ("unscale_", "gradient_norm", "clip_gradients_", "gated_step", "scaler.update"):
        assert step in loop, f"{step} is hidden from train_epoch()"


def test_a_run_has_eight_fields_and_prepare_fits_a_screen() -> None:
    assert len(dataclasses.fields(Run)) <= 8
    prepare = function(ROOT / "training" / "setup.py", "prepare")
    assert prepare.end_lineno is not None
    assert prepare.end_lineno - prepare.lineno + 1 <= 30


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PREPOSITIONS = {"Of", "In", "For", "With", "At", "By", "Where"}


@pytest.mark.parametrize(
    "path", [*modules(), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")], ids=label
)
def test_docstrings_stand_without_their_signature(path: Path) -> None:
    """The first word is no preposition: a docstring never goes on with the sentence that the name begins."""
    texts = [ast.get_docstring(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, DOCUMENTED)]
    assert [text for text in texts if text and text.split()[0].strip(",") in PREPOSITIONS] == []


def imported_names(tree: ast.Module) -> dict[str, str]:
    """Return what each imported name stands for: {"builders": "training.setup"} for an import with "as"."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = room_of(alias.name)
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted_name(node: ast.expr, imported: dict[str, str]) -> str:
    """Return the dotted name of an expression: "training.setup" for ``builders``; "" if it names nothing imported."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.rpartition(".")[0]  # monkeypatch.setattr("training.setup.prepare", ...)
    if isinstance(node, ast.Name):
        return imported.get(node.id, "")
    if isinstance(node, ast.Attribute) and (owner := dotted_name(node.value, imported)):
        return f"{owner}.{node.attr}"
    return ""


def belongs_to_the_program(name: str) -> bool:
    """Return whether a dotted name stands for a module or class of the program: "models.backbone.timm" does not."""
    if room_of(name) not in FLOOR_OF:
        return False
    value = pkgutil.resolve_name(name)
    home = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return room_of(home) in FLOOR_OF


def patches(path: Path) -> list[str]:
    """Return the lines of a file that replace an attribute of a module or class of the program."""
    tree = ast.parse(path.read_text())
    imported, targets = imported_names(tree), list[ast.expr]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("setattr", "delattr"):
            targets += node.args[:1]
        elif isinstance(node, ast.Assign):
            targets += [target.value for target in node.targets if isinstance(target, ast.Attribute)]
    found = [target for target in targets if belongs_to_the_program(dotted_name(target, imported))]
    return [f"{path.name}:{target.lineno}: {ast.unparse(target)}" for target in found]


@pytest.mark.parametrize(
    "code",
    [
        "from training import setup as builders\nmonkeypatch.setattr(builders, 'build_network', None)",
        "import training.setup\nsetattr(training.setup, 'build_network', None)",
        "import train_ultimate\ntrain_ultimate.validate = None",
        "from runtime.checkpoint import CheckpointStore\npatch.setattr(CheckpointStore, 'save_epoch', None)",
        "monkeypatch.setattr('training.setup.build_network', None)",
    ],
)
def test_a_patch_of_the_program_is_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "test_it.py").write_text(code)
    assert len(patches(tmp_path / "test_it.py")) == 1


def test_a_patch_of_the_outside_world_is_allowed(tmp_path: Path) -> None:
    code = "import os\nfrom models import backbone\npatch.setattr(os, 'fsync', 0)\npatch.setattr(backbone.timm, 'a', 0)"
    (tmp_path / "test_it.py").write_text(code)
    assert patches(tmp_path / "test_it.py") == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=label)
def test_tests_hand_parts_in_instead_of_patching_the_program(path: Path) -> None:
    assert patches(path) == []

"""The rules of the layout, checked on the syntax trees: who may import whom, and what stays at the entry points."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"data", "models", "losses", "metrics", "training"}
ENTRY_POINTS = {"train_ultimate", "cli", "commands", "reporting", "builders", "recovery", "window"}


def modules() -> list[Path]:
    return [
        *ROOT.glob("*.py"),
        *(
            path
            for package in ("data", "models", "training", "commands", "reporting")
            for path in (ROOT / package).glob("*.py")
        ),
    ]


def owner(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    if owner(path) in PACKAGES:
        foreign = imports(path) & ((PACKAGES | ENTRY_POINTS) - {owner(path)})
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_what_data_and_models_share_imports_nothing_of_the_program() -> None:
    assert not imports(ROOT / "photograph.py") & (PACKAGES | ENTRY_POINTS | {"inference", "photograph"})


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_below_the_entry_points_sees_the_command_line(path: Path) -> None:
    if owner(path) in PACKAGES | {"recovery", "window"}:
        assert "argparse" not in imports(path)


def test_timm_is_imported_in_one_place() -> None:
    assert [path.name for path in modules() if "timm" in imports(path)] == ["backbone.py"]


def test_training_knows_no_model_and_no_image() -> None:
    for path in (ROOT / "training").glob("*.py"):
        assert not imports(path) & {"timm", "torchvision", "PIL", "tqdm"}, path.name


def test_the_script_stays_readable_in_one_sitting() -> None:
    source = (ROOT / "train_ultimate.py").read_text()
    assert len(source.splitlines()) <= 450
    functions = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    train_epoch = functions["train_epoch"]
    assert train_epoch.end_lineno is not None
    assert train_epoch.end_lineno - train_epoch.lineno < 75
    loop = ast.unparse(train_epoch)
    for step in ("unscale_", "clip_grads_with_norm_", "gated_step", "scaler.update"):
        assert step in loop, f"{step} is hidden from train_epoch()"

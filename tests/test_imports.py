"""The arrows of docs/architecture.md: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "psf"
# The shell, and which other parts of it each part may import. Everything else is the core.
SHELL = {
    "config": {"options"},
    "console": set(),
    "data": {"images", "panoptic_png"},
    "evaluation": {"data", "images", "panoptic_png"},
    "finetuning": {"data", "weights"},
    "flops": set(),
    "inference": {"modeling.panoptic_segformer"},
    "modeling.backbone": set(),
    "modeling.build": {"data"},
    "modeling.panoptic_segformer": {"data", "modeling.build"},
    "images": set(),
    "options": set(),
    "panoptic_png": {"images"},
    "predictor": {"data", "finetuning", "images", "inference", "modeling.build"},
    "resuming": {"data"},
    "run_folder": {"weights"},
    "solver": set(),
    "stopping": set(),
    "train_step": {"resuming"},
    "trainer": {
        *("console", "data", "evaluation", "finetuning", "modeling.build", "options"),
        *("resuming", "run_folder", "solver", "stopping", "train_step"),
    },
    "weights": set(),
}
CORE_MAY_IMPORT = {"torch", "scipy", "numpy", "psf", *sys.stdlib_module_names}


def imports_of(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports."""
    package = ["psf", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def part_of(module: str) -> str | None:
    """The part of the shell that a module of psf belongs to; None for the core and others."""
    return next((part for part in SHELL if f"{module}.".startswith(f"psf.{part}.")), None)


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"
}


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name):
    imported = imports_of(MODULES[name])
    part = part_of(f"psf.{name}")
    parts = {p for module in imported if (p := part_of(module))} - {part}
    if part is not None:
        assert parts <= SHELL[part], f"{name} imports {parts}"
        return
    assert not parts, f"{name} is core but imports the shell: {parts}"
    foreign = {module.split(".")[0] for module in imported} - CORE_MAY_IMPORT
    assert not foreign, f"{name} is core but imports {foreign}"
    if name.startswith("layers"):
        assert not any(module.startswith("psf.modeling") for module in imported)


def test_every_module_is_seen():
    assert {"layers.ms_deform_attn", "modeling.criterion", "trainer", "config"} <= MODULES.keys()

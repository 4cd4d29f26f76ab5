"""The scripts set how OpenMP threads wait, before torch is loaded, unless the user has."""

import ast
import importlib
import os
import sys
from pathlib import Path

import pytest

from psf import threads

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / "train_net.py", *(ROOT / "demo").glob("*.py"), *(ROOT / "tools").glob("*.py")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, str(threads.SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),  # which GOMP_SPINCOUNT would override
    ],
)
def test_the_users_setting_stays(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(threads)
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    assert os.environ.get("OMP_WAIT_POLICY") == given.get("OMP_WAIT_POLICY")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_psf_first(script):
    body = ast.parse(script.read_text(encoding="utf-8")).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [getattr(node, "module", None) or node.names[0].name for node in imports]
    foreign = [m for m in modules if m.partition(".")[0] not in sys.stdlib_module_names]
    assert foreign[0].partition(".")[0] == "psf"

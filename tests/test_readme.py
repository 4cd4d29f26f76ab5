"""What the README shows must run as it stands there."""

import ast
import importlib
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import demo

ROOT = Path(__file__).parent.parent


@pytest.fixture
def trained(shapes_cfg, tmp_path, monkeypatch):
    """A folder in which ``make demo`` might have run, with a photo, as the current one."""
    output = tmp_path / "output" / "shapes"
    output.mkdir(parents=True)
    (output / "config.yaml").write_text(shapes_cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(shapes_cfg).state_dict()}, output / "model_final.pth")
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.jpg"), noise)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_predict_in_a_script(trained):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["panoptic_seg"].shape == (90, 120)
    assert isinstance(names["segments_info"], list)


def test_draw_on_images(trained):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"python demo/demo\.py (.*?)```", text, re.DOTALL).group(1)
    demo.main(command.replace("\\\n", " ").split())
    assert cv2.imread(str(trained / "drawn" / "photo.jpg")).shape[2] == 3


PAGES = [page for folder in (".", "docs", "datasets") for page in (ROOT / folder).glob("*.md")]


def test_every_file_that_the_docs_link_is_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)[)#]", text) + re.findall(r'src="([^":]+)"', text):
            assert (page.parent / link).exists(), f"{page.name} links {link}"


def test_every_heading_that_the_docs_link_is_there():
    linked = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
            target = page.parent / link if link else page
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in anchors, f"{page.name} links {link}#{anchor}"
            linked += 1
    assert linked > 0


def test_every_import_that_the_docs_show_works():
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for code in re.findall(r"```python\n(.*?)```|python -c \"(.*?)\"", text, re.DOTALL):
            for node in ast.walk(ast.parse("".join(code))):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    for name in node.names:
                        assert hasattr(module, name.name), f"{page.name}: {ast.unparse(node)}"
                        found.add(name.name)
    assert {"register_panoptic", "has_extension", "ms_deform_attn_fused"} <= found


def test_every_file_that_the_docs_name_is_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"\b(?:benchmarks|configs|demo|tools|tests)/[\w/-]+\.\w+", text):
            assert (ROOT / path).is_file(), f"{page.name} names {path}"

"""What the README shows must run as it stands there."""

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))
import demo  # noqa: E402  a script, not a module of the package


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
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["panoptic_seg"].shape == (90, 120)
    assert isinstance(names["segments_info"], list)


def test_draw_on_images(trained):
    text = (ROOT / "README.md").read_text()
    command = re.search(r"python demo/demo\.py (.*?)```", text, re.DOTALL).group(1)
    demo.main(command.replace("\\\n", " ").split())
    assert cv2.imread(str(trained / "drawn" / "photo.jpg")).shape[2] == 3


def test_every_file_that_the_docs_link_is_there():
    for page in ROOT.glob("*.md"):
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+)[)#]", text) + re.findall(r'src="([^":]+)"', text):
            assert (page.parent / link).exists(), f"{page.name} links {link}"


def test_every_config_that_the_docs_name_is_there():
    for page in ROOT.glob("*.md"):
        for config in re.findall(r"configs/[\w/]+\.yaml", page.read_text()):
            assert (ROOT / config).is_file(), f"{page.name} names {config}"

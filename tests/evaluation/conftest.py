"""The data sets of these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny_panoptic import Maker


@pytest.fixture
def make_dataset(tmp_path: Path) -> Iterator[Maker]:
    """Make a data set of layouts; returns its name. Metadata may be changed by the test."""
    maker = Maker(tmp_path)
    yield maker
    for name in maker.names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

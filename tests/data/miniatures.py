"""A few images in the layout, with the file names and encodings, of each official download."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from psf.data.coco_writer import PanopticImage, Segment, Split, write_image, write_json_files

HEIGHT, WIDTH = 48, 64


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _photo(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    _save(path, noise)


def zip_folder(folder: Path, archive: Path) -> None:
    """Move a folder into an archive, beside which it lies."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    _remove(folder)


def tar_folder(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w") as file:
        file.add(folder, folder.name)
    _remove(folder)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def make_ade20k(root: Path, num_images: int = 2) -> None:
    """Labels 0 (nothing) and 1..150; instances as (category 1..100, instance) in red and green."""
    data = root / "ADEChallengeData2016"
    for folder, prefix in (("training", "train"), ("validation", "val")):
        for i in range(1, num_images + 1):
            name = f"ADE_{prefix}_{i:08d}"
            _photo(data / "images" / folder / f"{name}.jpg", i)
            labels = np.ones((HEIGHT, WIDTH), dtype=np.uint8)  # wall
            labels[:20] = 3  # sky
            labels[:5] = 0
            labels[30:40, 5:50] = 13  # person
            _save(data / "annotations" / folder / f"{name}.png", labels)
            instances = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            instances[30:40, 5:25] = (4, 1, 0)  # person is 4 of 100
            instances[30:40, 25:52] = (4, 2, 0)  # covers some wall
            instances[10:15, 10:20] = (9, 3, 0)  # a car in the sky
            _save(data / "annotations_instance" / folder / f"{name}.png", instances)
    tar_folder(data / "annotations_instance", root / "annotations_instance.tar")
    zip_folder(data, root / "ADEChallengeData2016.zip")


def make_cityscapes(root: Path, num_images: int = 2) -> None:
    """16-bit instance ids in a folder for each city."""
    data = root / "cityscapes"
    for split, city in (("train", "aachen"), ("val", "frankfurt")):
        for i in range(num_images):
            name = f"{city}_{i:06d}_000019"
            _photo(data / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", i)
            ids = np.full((HEIGHT, WIDTH), 7, dtype=np.uint16)  # road
            ids[:20] = 23  # sky
            ids[:3] = 3  # out of region of interest: void
            ids[25:40, 5:25] = 26000  # a car
            ids[25:40, 30:50] = 26001  # another
            ids[10:14, 40:60] = 24  # a group of persons
            ids[40:46, 2:8] = 29000  # a caravan: not evaluated
            _save(data / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", ids)
            labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
            _save(data / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", labels)
    zip_folder(data / "gtFine", data / "gtFine_trainvaltest.zip")
    zip_folder(data / "leftImg8bit", data / "leftImg8bit_trainvaltest.zip")


def make_coco(root: Path, num_images: int = 2) -> None:
    """The PNGs are in archives within the archive of the annotations."""
    data = root / "coco"
    folder = data / "annotations"
    index_map = np.full((HEIGHT, WIDTH), 2)
    index_map[20:40, 10:30] = 1
    index_map[:2] = 0
    segments = [Segment(COCO_CATEGORIES[0]["id"], id=300), Segment(187, id=70000)]  # person, sky
    for split in ("train2017", "val2017"):
        panoptic, instances = (
            folder / f"{kind}_{split}.json" for kind in ("panoptic", "instances")
        )
        files = Split(split, folder / f"panoptic_{split}", panoptic, instances, COCO_CATEGORIES)
        files.panoptic_root.mkdir(parents=True)
        entries = []
        for i in range(1, num_images + 1):
            name = f"{i:012d}"
            _photo(data / split / f"{name}.jpg", i)
            image = PanopticImage(i, f"{name}.jpg", f"{name}.png", index_map, segments)
            entries.append(write_image(files, image))
        write_json_files(files, entries)
        zip_folder(folder / f"panoptic_{split}", folder / f"panoptic_{split}.zip")
        zip_folder(data / split, data / f"{split}.zip")
    zip_folder(data / "annotations", data / "panoptic_annotations_trainval2017.zip")

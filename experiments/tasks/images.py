"""Image classification: eight published data sets, or a folder of pictures by class."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image

from experiments.errors import ExperimentError
from experiments.tasks.splits import Splits, carve
from experiments.tasks.task import Task

# those of Uni-LoRA's comparison (arXiv 2506.00799, Table 5), in its order
PICTURES = {
    "pets": Splits("timm/oxford-iiit-pet", "pets", rows={"train": 3680, "test": 3669}),
    "cars": Splits("tanganke/stanford_cars", "cars", rows={"train": 8144, "test": 8041}),
    "cifar10": Splits("uoft-cs/cifar10", "cifar10", rows={"train": 50000, "test": 10000}),
    "dtd": Splits("tanganke/dtd", "dtd", rows={"train": 3760, "test": 1880}),
    "eurosat": Splits("timm/eurosat-rgb", "eurosat", rows={"train": 16200, "validation": 5400, "test": 5400}),
    "fgvc": Splits("Multimodal-Fatima/FGVC_Aircraft_{split}", "fgvc", rows={"train": 3334, "test": 3333}),
    "resisc45": Splits("timm/resisc45", "resisc45", rows={"train": 18900, "validation": 6300, "test": 6300}),
    "cifar100": Splits("uoft-cs/cifar100", "cifar100", rows={"train": 50000, "test": 10000}),
}
# what CIFAR calls the columns of image and label
_RENAMED = {"img": "image", "fine_label": "label"}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def published(name: str, data: str) -> Task:
    """A data set of PICTURES; where its authors publish no validation split, that is carved from train.

    DTD: train and validation of the first of its ten divisions are one split on the hub. FGVC: the 100 variants.
    """
    splits = PICTURES[name]

    def read(split: str) -> pd.DataFrame:
        whole = split == "test" or "validation" in splits.rows
        rows = splits.read(split if whole else "train", data).rename(columns=_RENAMED)
        return rows if whole else carve(rows, split)

    return Task(name, "image", read, published=splits.rows)


def has_pictures(folder: Path) -> bool:
    """Whether train/ of a folder holds pictures in one folder per class."""
    return any(path.suffix.lower() in _SUFFIXES for path in folder.glob("train/*/*"))


def pictures(folder: Path) -> Task:
    """<folder>/train/<class>/<picture> and test/; validation/ or else a part of train is the validation split."""
    classes = tuple(sorted({path.parent.name for path in _pictures(folder / "train")}))

    def listed(split: str) -> pd.DataFrame:
        found = _pictures(folder / split)
        if not found or {path.parent.name for path in found} - set(classes):
            unknown = sorted({path.parent.name for path in found} - set(classes))
            raise ExperimentError(
                f"tasks: {folder / split} must hold pictures ({', '.join(sorted(_SUFFIXES))}) in folders named as "
                f"those of train ({', '.join(classes)}), got {', '.join(unknown) or 'none'}. "
                f"{'Add pictures of it to train, or drop it here' if unknown else 'Add the split'}."
            )
        images = [{"bytes": None, "path": str(path)} for path in found]
        return pd.DataFrame({"image": images, "label": [classes.index(path.parent.name) for path in found]})

    def read(split: str) -> pd.DataFrame:
        if split == "test" or ((folder / split).is_dir() and split == "validation"):
            return listed(split)
        rows = listed("train")
        return rows if (folder / "validation").is_dir() else carve(rows, split)

    return Task(str(folder), "image", read, classes=classes)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.suffix.lower() in _SUFFIXES)


def check_pictures(rows: pd.DataFrame) -> None:
    """Raises ExperimentError that names the first picture which is none."""
    for image in rows["image"]:
        if image["path"] is not None and image["bytes"] is None:
            try:
                Image.open(image["path"]).close()
            except OSError as error:
                raise ExperimentError(
                    f"tasks: {image['path']} must be a picture, got: {error}. Repair or remove it."
                ) from error

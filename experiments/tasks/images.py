"""Image classification: CIFAR-10, CIFAR-100, or a folder of pictures by class."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image

from experiments.errors import ExperimentError
from experiments.tasks.splits import Splits, carve
from experiments.tasks.task import Task

# name -> (columns of image and label on the hub)
CIFAR = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def cifar(name: str, data: str) -> Task:
    """CIFAR (Krizhevsky 2009): 50,000 / 10,000 pictures of 32 x 32; the validation split is carved from train."""
    image, label = CIFAR[name]
    splits = Splits(f"uoft-cs/{name}", name, None, {"train": 50000, "test": 10000})

    def read(split: str) -> pd.DataFrame:
        rows = splits.read("test" if split == "test" else "train", data).rename(
            columns={image: "image", label: "label"}
        )
        return rows if split == "test" else carve(rows, split)

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

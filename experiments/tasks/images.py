"""Image classification: CIFAR-10, CIFAR-100, or a folder of pictures by class."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.errors import ExperimentError
from experiments.tasks.sources import Source, carve
from experiments.tasks.task import Task

# name -> (columns of image and label on the hub)
CIFAR = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def cifar(name: str, data: str) -> Task:
    """CIFAR (Krizhevsky 2009): 50,000 / 10,000 pictures of 32 x 32; the validation split is carved from train."""
    image, label = CIFAR[name]
    source = Source(f"uoft-cs/{name}", name, None, {"train": 50000, "test": 10000})

    def read(split: str) -> pd.DataFrame:
        rows = source.read("test" if split == "test" else "train", data).rename(
            columns={image: "image", label: "label"}
        )
        return rows if split == "test" else carve(rows, split)

    return Task(name, "image", read, published=source.rows)


def has_pictures(folder: Path) -> bool:
    """Whether train/ of a folder holds pictures in one folder per class."""
    return any(path.suffix.lower() in SUFFIXES for path in folder.glob("train/*/*"))


def pictures(folder: Path) -> Task:
    """<folder>/train/<class>/<picture> and test/; validation/ or else a part of train is the validation split."""
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())

    def listed(split: str) -> pd.DataFrame:
        found = [
            {"image": {"bytes": None, "path": str(path)}, "label": label}
            for label, name in enumerate(classes)
            for path in sorted((folder / split / name).glob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise ExperimentError(
                f"tasks: {folder / split} must hold pictures ({', '.join(sorted(SUFFIXES))}) in folders named as those "
                f"of train ({', '.join(classes)}), got none. Add the split."
            )
        return pd.DataFrame(found)

    def read(split: str) -> pd.DataFrame:
        if split == "test" or ((folder / split).is_dir() and split == "validation"):
            return listed(split)
        rows = listed("train")
        return rows if (folder / "validation").is_dir() else carve(rows, split)

    return Task(str(folder), "image", read)

"""The eight image data sets: their names on the hub, their splits, and the same as files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
import pytest

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.sweeps.file import CONF, read

# the pictures that their authors publish of each split, and the classes
SIZES = {
    "pets": ({"train": 3680, "test": 3669}, 37),
    "cars": ({"train": 8144, "test": 8041}, 196),
    "cifar10": ({"train": 50000, "test": 10000}, 10),
    "dtd": ({"train": 3760, "test": 1880}, 47),
    "eurosat": ({"train": 16200, "validation": 5400, "test": 5400}, 10),
    "fgvc": ({"train": 3334, "test": 3333}, 100),
    "resisc45": ({"train": 18900, "validation": 6300, "test": 6300}, 45),
    "cifar100": ({"train": 50000, "test": 10000}, 100),
}
COLUMNS = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}


def _rows(name: str, split: str, count: int) -> dict[str, list]:
    """As `datasets` gives pictures to pandas, each with the split and its place as its bytes."""
    image, label = COLUMNS.get(name, ("image", "label"))
    pictures = [{"bytes": f"{split} {place}".encode(), "path": None} for place in range(count)]
    return {image: pictures, label: [place % SIZES[name][1] for place in range(count)]}


@pytest.mark.parametrize("name", SIZES)
def test_the_hubs_splits_are_those_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, asked = dict(SIZES[name][0]), []

    def load(path: str, subset: None, split: str, trust_remote_code: bool) -> datasets.Dataset:
        asked.append(path)
        assert subset is None and not trust_remote_code
        return datasets.Dataset.from_dict(_rows(name, split, sizes[split]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    parts = {split: tasks.get(name).split(split) for split in tasks.SPLITS}
    held_out = sizes.get("validation", min(1000, sizes["train"] // 10))
    trained = sizes["train"] - (0 if "validation" in sizes else held_out)
    assert {split: len(rows) for split, rows in parts.items()} == {
        "train": trained, "validation": held_out, "test": sizes["test"],
    }  # fmt: skip
    # every picture is in one split, and only those of the published test split are test rows
    shown = {split: {image["bytes"] for image in rows["image"]} for split, rows in parts.items()}
    assert len(set().union(*shown.values())) == sum(sizes.values())
    assert {text.split()[0] for text in shown["test"]} == {b"test"}
    assert len(set(asked)) == (2 if name == "fgvc" else 1)
    sizes["test"] -= 1
    with pytest.raises(ExperimentError, match=rf"{asked[-1]}.* must have {sizes['test'] + 1:,} rows in 'test'"):
        tasks.get(name).split("test")


@pytest.mark.parametrize("name", SIZES)
def test_the_same_splits_are_read_from_files(name: str, tmp_path: Path) -> None:
    for split in SIZES[name][0]:
        (tmp_path / name).mkdir(exist_ok=True)
        pd.DataFrame(_rows(name, split, 40)).to_parquet(tmp_path / name / f"{split}.parquet")
    parts = {split: tasks.get(name, str(tmp_path)).split(split) for split in tasks.SPLITS}
    counts = {"train": 40, "validation": 40, "test": 40}
    assert {split: len(rows) for split, rows in parts.items()} == (
        counts if "validation" in SIZES[name][0] else counts | {"train": 36, "validation": 4}
    )
    row = parts["test"].iloc[7]
    assert row["image"]["bytes"] == b"test 7" and row["label"] == 7


def test_the_recipe_has_every_data_set_on_both_models() -> None:
    """The rates are those of the paper's scripts."""
    cases = read(CONF / "sweeps" / "paper" / "vision.yaml").cases
    assert Counter(case["task"] for case in cases) == dict.fromkeys(SIZES, 2)
    rates = {(case["d"], case["task"]): (case["lr"], case["head_lr"]) for case in cases}
    base = {"pets": (5e-3, 5e-3), "cifar100": (1e-2, 1e-2)}
    large = dict.fromkeys(("cifar10", "cifar100"), 5e-3) | dict.fromkeys(("pets", "eurosat"), 2e-2)
    for name in SIZES:
        assert rates[72000, name] == base.get(name, (1e-2, 5e-2))
        assert rates[144000, name] == (1e-2, large.get(name, 1e-2))

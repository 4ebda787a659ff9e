"""Tasks: the packaged data as published, metrics, and what is refused."""

import pandas as pd
import pytest

from experiments import tasks
from experiments.compare import committed, default_budget
from experiments.errors import ExperimentError
from experiments.models import adapted_shapes, load_tokenizer, location
from experiments.runs.folder import prepare
from experiments.runs.resolve import resolve
from experiments.runs.run import Run
from uniproj import ProjectionError


def test_the_packaged_reviews_have_the_published_counts() -> None:
    parts = {split: tasks.get("vader").split(split) for split in tasks.SPLITS}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 8000, "validation": 1000, "test": 1566}
    everything = pd.concat(parts.values())
    assert everything["text"].is_unique and set(everything["label"]) == {0, 1}
    assert 0.49 < parts["test"]["label"].mean() < 0.51
    assert parts["test"].equals(tasks.get("vader").split("test"))


def test_float_labels_are_a_regression(tmp_path) -> None:
    rows = pd.DataFrame({"text": ["a", "b", "c"], "label": [0.5, -1.0, 2.0]})
    for split in tasks.SPLITS:
        rows.to_parquet(tmp_path / f"{split}.parquet")
    task = tasks.get(str(tmp_path))
    predictions = pd.DataFrame({"label": [1.0, 2.0, 3.0], "prediction": [2.0, 4.0, 9.0]})
    scores = task.scores(predictions)
    assert task.metric == "Pearson" and scores["Spearman"] == 1.0 and scores["Pearson"] == pytest.approx(7 / 52**0.5)


def test_unknown_names_list_the_known_ones(tmp_path, model) -> None:
    with pytest.raises(ExperimentError, match=r"unknown task 'glue/colo'. Known: vader, glue/cola, glue/sst2"):
        tasks.get("glue/colo")
    with pytest.raises(ExperimentError, match="must hold train as one of"):
        tasks.get(str(tmp_path))
    with pytest.raises(ExperimentError, match=r"must be one of minilm, smollm2, a local folder"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ExperimentError, match="must be a GGUF file"):
        location(str(tmp_path / "no.gguf"))
    with pytest.raises(ProjectionError, match="Known: fastfood"):
        resolve({"task": "vader", "model": model, "projection": "nothing", "budget": 100, "seed": 0, "lr": 0.1})


def test_every_compared_method_meets_the_default_budget() -> None:
    from experiments.runs.config import REFERENCE

    budget = default_budget("vader", "minilm")
    assert budget == 4740 and len(adapted_shapes("text", "minilm")) == 12
    for name in (case["projection"] for case in committed().cases):
        config = resolve(
            {"task": "vader", "model": "minilm", "projection": name, "budget": budget, "seed": 0, "lr": 0.1}
        )
        assert (config.budget is None) == (name == REFERENCE)


def test_glue_scores_on_the_published_validation_split_and_holds_out_part_of_train(monkeypatch) -> None:
    import datasets

    published = {"train": list(range(2490)), "validation": list(range(3000, 3277))}

    def load(path: str, subset: str, split: str, trust_remote_code: bool) -> datasets.Dataset:
        assert not trust_remote_code
        assert (path, subset) == ("nyu-mll/glue", "rte")
        rows = published[split]
        return datasets.Dataset.from_dict(
            {"sentence1": [str(i) for i in rows], "sentence2": ["x"] * len(rows), "label": [i % 2 for i in rows]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    parts = {split: set(tasks.get("glue/rte").split(split)["sentence1"]) for split in tasks.SPLITS}
    assert parts["test"] == {str(i) for i in published["validation"]}
    assert len(parts["validation"]) == 249 and len(parts["train"]) == 2241 and not parts["train"] & parts["validation"]
    published["train"].pop()
    with pytest.raises(ExperimentError, match=r"must have 2,490 rows in 'train' as published, got 2,489"):
        tasks.get("glue/rte").split("train")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"train": [0] * 12}, "classes must be two or more, got 0 alone"),
        (
            {"train": [0, 1] * 6, "test": [0, 2]},
            r"test: labels must occur in the training rows \(0, 1\), got 2 in row 2",
        ),
        ({"train": [0.5] * 12, "test": [0.5, 1.0]}, "float labels must be two or more, got 0.5 alone"),
        ({"train": [0, 1] * 3}, "at least 10, or a validation file"),
    ],
)
def test_labels_that_cannot_be_learned_are_said_before_training(labels, message: str, tmp_path, model: str) -> None:
    for split, values in {"test": [0, 1], **labels}.items():
        rows = pd.DataFrame({"text": [f"text {i}" for i in range(len(values))], "label": values})
        rows.to_parquet(tmp_path / f"{split}.parquet")
    config = resolve({"task": str(tmp_path), "model": model, "projection": "unilora", "d": 8, "seed": 0, "lr": 0.1})
    with pytest.raises(ExperimentError, match=message):
        Run.load(prepare(tmp_path / "runs", config.to_json()))

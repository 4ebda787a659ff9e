"""A user's own rows: texts stay what is written, labels of any kind become classes that can be read back."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.files import read_json
from experiments.runs.data import check_rows, describe, draw
from experiments.runs.folder import prepare
from experiments.runs.resolve import resolve
from experiments.runs.run import Run
from experiments.tasks.formats import FORMATS, read_csv, read_tsv
from experiments.tasks.splits import read_file

LOOKALIKES = ["12", "007", "1.50", "True", "False", "NA", "null", "nan", "None", "2024-01-01", "1e5"]


def _folder(folder: Path, suffix: str = ".jsonl", **splits: dict) -> Path:
    """Rows of each split in a file of this format; the test set is that of train where it is not given."""
    for split, rows in {"test": splits["train"], "validation": splits["train"], **splits}.items():
        _write(pd.DataFrame(rows), folder / f"{split}{suffix}")
    return folder


def _write(rows: pd.DataFrame, path: Path) -> None:
    {
        ".jsonl": lambda: rows.to_json(path, orient="records", lines=True),
        ".csv": lambda: rows.to_csv(path, index=False),
        ".tsv": lambda: rows.to_csv(path, sep="\t", index=False),
        ".parquet": lambda: rows.to_parquet(path),
    }[path.suffix]()


# ---- what is written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "columns", [("text",), ("premise", "hypothesis"), ("question", "sentence"), ("prompt", "completion")]
)
def test_texts_that_look_like_something_else_stay_texts(suffix: str, columns: tuple, tmp_path: Path) -> None:
    for value in (LOOKALIKES, ["1", "2"], ["True", "False"], ["1.0", "2.5"]):
        rows = {column: value for column in columns} | {"label": [0, 1] * (len(value) // 2) + [0] * (len(value) % 2)}
        task = tasks.get(str(_folder(tmp_path, suffix, train=rows)))
        found = task.split("test")
        assert all(found[column].tolist() == value for column in columns)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_a_byte_order_mark_belongs_to_no_column(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"train{suffix}"
    _write(pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}), path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(read_file(tmp_path, "train")) == ["text", "label"]


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\0"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_csv_round_trips_whatever_pandas_writes(tmp_path_factory, rows: list) -> None:
    written = pd.DataFrame(rows, columns=["premise", "hypothesis"])
    path = tmp_path_factory.mktemp("csv") / "train.csv"
    written.to_csv(path, index=False)
    assert read_csv(path).values.tolist() == written.values.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text('ab "', min_size=1).filter(str.strip)] * 2),
        min_size=1,
        max_size=5,
    )
)
def test_a_tsv_of_pandas_keeps_its_texts(tmp_path_factory, rows: list) -> None:
    """Quotes and blanks in any order: pandas doubles quotes within quotes."""
    written = pd.DataFrame(rows, columns=["premise", "hypothesis"])
    path = tmp_path_factory.mktemp("tsv") / "train.tsv"
    written.to_csv(path, sep="\t", index=False)
    assert read_tsv(path).values.tolist() == written.values.tolist()


@pytest.mark.parametrize(
    "text", ['"Great" film', '"Great film"', 'a 7" single', '"', '""', '"Great, I said.', 'so "good" and "bad"']
)
def test_a_quote_in_plain_tsv_is_a_character(text: str, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(f"text\tlabel\n{text}\t1\nDull.\t0\nNA\t0\n")
    assert read_file(tmp_path, "train")["text"].tolist() == [text, "Dull.", "NA"]


def test_a_stray_quote_does_not_swallow_rows(tmp_path: Path) -> None:
    lines = ["text\tlabel", '"Great, I said.\t1', "Dull.\t0", 'Long."\t0', "NA\t1"]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    assert read_file(tmp_path, "train")["text"].tolist() == ['"Great, I said.', "Dull.", 'Long."', "NA"]
    (tmp_path / "train.tsv").write_text("\n".join([*lines, "a\tb\tc"]))
    with pytest.raises(ExperimentError, match="3 fields in line 6 under a header of 2"):
        read_file(tmp_path, "train")


def test_a_tsv_with_line_breaks_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = pd.DataFrame({"text": ["two\nlines", 'a "quote"', "a\u2028b", "plain"], "label": [0, 1, 0, 1]})
    rows.to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    pd.testing.assert_frame_equal(read_file(tmp_path, "train"), rows)
    rows.to_csv(tmp_path / "train.tsv", sep="\t", index=False, quoting=1)  # every field in quotes
    assert read_file(tmp_path, "train")["text"].tolist() == rows["text"].tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", 'text,label\n"Great" film,1\n', "train.csv must be valid csv, got: line 2: ',' expected after"),
        ("train.csv", 'text,label\n"Great,1\nDull,0\n', "valid csv, got: line 3: unexpected end of data"),
        ("train.csv", "text,label\na,0\na, b,1\n", "3 fields in line 3 under a header of 2"),
        ("train.csv", "text,text,label\na,b,0\n", "columns of one name"),
        ("train.csv", b"text,label\ncaf\xe9,0\n", "text that is not UTF-8"),
        ("train.jsonl", '{"text": "a", "label": 0}\n["a", 0]\n', "line 2 is no object but a list"),
        ("train.jsonl", '{"text": "a", "label": 0}\n{"text": \n', "train.jsonl must be valid jsonl, got: line 2"),
        ("train.jsonl", "", "train.jsonl must hold rows, got none: it is empty"),
        ("train.csv", "text,label\n", "train.csv must hold rows, got none: it is empty"),
        ("train.tsv", "\n", "train.tsv must hold rows, got none: it is empty"),
        ("train.parquet", b"PAR1", "train.parquet must be valid parquet"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ExperimentError, match=message):
        read_file(tmp_path, "train")


# ---- labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([13, 3, 53, 3], (3, 13, 53)),
        ([1, -1, 0, 1], (-1, 0, 1)),
        (["spam", "ham", "spam", "eggs"], ("eggs", "ham", "spam")),
        (["no", "NA", "no", "yes"], ("NA", "no", "yes")),
    ],
)
@pytest.mark.parametrize("suffix", FORMATS)
def test_the_distinct_labels_of_train_are_the_classes(suffix: str, labels: list, classes: tuple, tmp_path) -> None:
    task = tasks.get(str(_folder(tmp_path, suffix, train={"text": list("abcd"), "label": labels})))
    assert task.classes == classes and task.metric == "accuracy" and json.dumps(task.classes)
    assert [task.classes[i] for i in task.split("test")["label"]] == labels


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["01", "1", "2"], ("01", "1", "2")),
        (["02139", "12345", "02139"], ("02139", "12345")),
        (["inf", "nan", "infinity"], ("inf", "infinity", "nan")),
        (["1_2", "3_4", "1_2"], ("1_2", "3_4")),
        (["\u0661", "\u0662", "\u0661"], ("\u0661", "\u0662")),
        ([" a", "a", "b "], ("a", "b")),
        ([" 3", "3 ", "13"], (3, 13)),
    ],
)
def test_labels_of_files_without_types_are_merged_by_no_reading(suffix, labels, classes, tmp_path: Path) -> None:
    rows = "".join(f"t{i}{',' if suffix == '.csv' else chr(9)}{label}\n" for i, label in enumerate(labels * 4))
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}{suffix}").write_text(f"text{',' if suffix == '.csv' else chr(9)}label\n{rows}")
    assert tasks.get(str(tmp_path)).classes == classes


@pytest.mark.parametrize(("train", "test"), [([True, False], [1, 0]), ([1, 0], [True, False])])
def test_truth_values_are_no_numbers_in_another_split(train: list, test: list, tmp_path: Path) -> None:
    splits = {"train": train * 3, "test": test * 3}
    folder = _folder(tmp_path, train={"text": list("abcdef"), "label": splits["train"]})
    _write(pd.DataFrame({"text": list("abcdef"), "label": splits["test"]}), folder / "test.jsonl")
    with pytest.raises(ExperimentError, match=f"must occur in the training rows .*got {test[0]} in row 1"):
        tasks.get(str(folder)).split("test")


@pytest.mark.parametrize(
    "index", [list("abcdef"), [5] * 6, list(range(10, 16)), pd.date_range("2020-01-01", periods=6)], ids=str
)
def test_rows_are_counted_as_the_file_has_them_whatever_its_index(index, tmp_path: Path) -> None:
    rows = pd.DataFrame({"text": list("abcdef"), "label": ["x", "y"] * 3})
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    rows.assign(label=["x", "y", "x", "new", "y", "x"]).set_index(pd.Index(index)).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ExperimentError, match="got 'new' in row 4"):
        tasks.get(str(tmp_path)).split("test")


def test_a_split_lies_in_one_file(tmp_path: Path) -> None:
    _folder(tmp_path, train={"text": list("abcdef"), "label": [0, 1] * 3})
    _write(pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "train.csv")
    with pytest.raises(ExperimentError, match=r"train in one file, got train.jsonl and train.csv"):
        tasks.get(str(tmp_path))


def test_a_part_of_the_validation_rows_is_validated_on(tmp_path: Path) -> None:
    _folder(tmp_path, train={"text": list("abcdef"), "label": [0, 1] * 3})
    (tmp_path / "validation.jsonl").rename(tmp_path / "validation_subset.jsonl")
    task = tasks.get(str(tmp_path))
    assert len(task.split("train")) == len(task.split("validation")) == 6


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_truth_values_and_numbers_written_as_text_are_classes_too(suffix: str, tmp_path: Path) -> None:
    for labels, classes in (([True, False, True], (False, True)), (["10", "9", "9"], ("10", "9"))):
        task = tasks.get(str(_folder(tmp_path, suffix, train={"text": list("abc"), "label": labels})))
        assert task.classes == classes and task.split("train")["label"].tolist() == [classes.index(v) for v in labels]


@pytest.mark.parametrize("suffix", FORMATS)
def test_float_labels_stay_numbers_whatever_the_test_set_holds(suffix: str, tmp_path: Path) -> None:
    train, test = ({"text": list("ab"), "label": labels} for labels in ([0.5, 3.0], [1, 2]))
    task = tasks.get(str(_folder(tmp_path, suffix, train=train, test=test)))
    assert task.classes == () and task.metric == "Pearson"
    assert task.split("test")["label"].tolist() == [1.0, 2.0] and task.split("test")["label"].dtype == float


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, "two", 1, 0], "got 'two' in row 3, while 4 of 5 are a number"),
        (["a", "b", "a", 4, "b"], "got 4 in row 4, while 4 of 5 are text"),
        ([0.5, 1.5, 0.5, 2.5, "n/a"], "got 'n/a' in row 5, while 4 of 5 are a number"),
        ([0, 1, 0, None, 1], "every row must have text and label, got 1 missing values .* the first in row 4"),
        ([0.5, 1.0, float("nan"), 2.0, 1.0], "1 missing values .* the first in row 3"),
        (["a", None, "b", None, "a"], "2 missing values .* the first in row 2"),
        ([0.5, float("inf"), 1.0, 2.0, 1.5], "got '?inf'? in row 2"),
        ([True, 1, 0, 1, 0], "got True in row 1, while 4 of 5 are a number"),
        (["a", "", "b", "a", "b"], "got '' in row 2|1 missing values .* the first in row 2"),
        ([[1], [2], [1], [2], [1]], r"got \[1\] in row 1"),
    ],
)
def test_a_label_that_is_none_is_named_with_its_row(labels: list, message: str, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    for split in tasks.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ExperimentError, match=message):
        tasks.get(str(tmp_path)).split("train")
    if any(isinstance(label, list | bool) for label in labels):
        return  # which csv does not have
    for split in tasks.SPLITS:
        (tmp_path / f"{split}.jsonl").unlink()
        pd.DataFrame(rows).astype({"label": object}).to_csv(tmp_path / f"{split}.csv", index=False)
    with pytest.raises(ExperimentError, match=message):
        tasks.get(str(tmp_path)).split("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["a", "b"], r"text must be text, got \['a', 'b'\] in row 2. Write it as one text"),
        (12, "text must be text, got 12 in row 2"),
        (True, "text must be text, got True in row 2"),
        ({"a": 1}, "text must be text, got {'a': 1} in row 2"),
        (None, "every row must have text and label, got 1 missing values .* the first in row 2"),
    ],
)
def test_what_is_no_text_is_named_with_its_row(text: object, message: str, tmp_path: Path) -> None:
    rows = [{"text": "one", "label": 0}, {"text": text, "label": 1}]
    for split in tasks.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ExperimentError, match=message):
        tasks.get(str(tmp_path)).split("train")


@pytest.mark.parametrize("answer", ["", ".", None])
def test_an_answer_that_every_text_ends_with_is_refused(answer: str | None, tmp_path: Path) -> None:
    rows = {"prompt": ["1 + 1", "2 + 2"], "completion": ["2", "4"]}
    task = tasks.get(str(_folder(tmp_path, train=rows, test={**rows, "answer": ["2", answer]})))
    with pytest.raises(ExperimentError, match="test: every row must have an answer to compare with, got none in row 2"):
        task.split("test")


# ---- before any run -------------------------------------------------------------------------------------


def _config(folder: Path, model: str, **settings: object):
    return resolve(
        {"task": str(folder), "model": model, "projection": "unilora", "d": 8, "seed": 0, "lr": 0.1, **settings}
    )


@pytest.mark.parametrize(
    ("metric", "labels", "message"),
    [
        ("Pearson", [0, 1, 2], "the metric of classes must be one of F1, Matthews, accuracy, macro F1, got Pearson"),
        ("accuracy", [0.5, 1.0, 2.0], "the metric of float labels must be one of Pearson, Spearman, got accuracy"),
        ("F1", [0, 1, 2], "F1 is of two classes, got 3. Choose macro F1"),
    ],
)
def test_a_metric_that_the_labels_do_not_have_is_refused(metric, labels, message: str, tmp_path, model: str) -> None:
    folder = _folder(tmp_path, train={"text": list("abc"), "label": labels})
    config = _config(folder, model, metric=metric)
    with pytest.raises(ExperimentError, match=message):
        check_rows(tasks.get(config.task, config.data, config.metric), config)
    with pytest.raises(ExperimentError, match="metric must be one of accuracy, F1, macro F1"):
        _config(folder, model, metric="f-score")


def test_correlations_need_two_values_in_the_rows_that_are_scored(tmp_path: Path, model: str) -> None:
    train = {"text": list("abcd"), "label": [0.5, 1.0, 0.5, 2.0]}
    folder = _folder(tmp_path, train=train, validation={"text": ["a", "b"], "label": [1.0, 1.0]})
    with pytest.raises(ExperimentError, match="validation: Pearson needs rows with two labels or more, got 2 with 1"):
        check_rows(tasks.get(str(folder)), _config(folder, model))
    with pytest.raises(ExperimentError, match="validation: Pearson needs rows with two labels or more, got 1 with 1"):
        check_rows(tasks.get(str(folder)), _config(folder, model, validation_size=1))


def test_pictures_of_a_class_that_train_lacks_and_files_that_are_none(tmp_path: Path, model: str) -> None:
    from PIL import Image

    for split, name in (("train", "cat"), ("train", "dog"), ("validation", "cat"), ("test", "cat"), ("test", "cow")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / name / "one.png")
    task = tasks.get(str(tmp_path))
    assert task.classes == ("cat", "dog") and task.split("train")["label"].tolist() == [0, 1]
    with pytest.raises(ExperimentError, match=r"named as those of train \(cat, dog\), got cow"):
        task.split("test")
    (tmp_path / "test" / "cow" / "one.png").unlink()
    broken = tmp_path / "validation" / "cat" / "one.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ExperimentError, match=f"{broken} must be a picture"):
        check_rows(task, _config(tmp_path, model, projection="lora", d=None))


# ---- a run ----------------------------------------------------------------------------------------------


def test_a_run_on_string_labels_keeps_what_its_classes_are(tmp_path: Path, model: str, runs: Path) -> None:
    from experiments import train

    labels = ["spam", "ham", "ham", "eggs"] * 3
    rows = {"text": [f"a text of {label}" for label in labels], "label": labels}
    config = _config(_folder(tmp_path, ".csv", train=rows), model, metric="macro F1", epochs=1)
    place = prepare(runs, config.to_json())
    assert train.main([str(place)]) == 0
    result = read_json(place / "result.json")
    assert result["classes"] == ["eggs", "ham", "spam"] and result["metric"] == "macro F1"
    assert result["head"] == 3 * 32 + 3
    predictions = pd.read_csv(place / "predictions-last.csv")
    assert [result["classes"][i] for i in predictions["label"]] == draw(pd.Series(labels), None, 0).tolist()
    # by hand: the F1 of each class, and always answering "ham": 2 * 6/12 / (1 + 6/12) of three classes
    each = []
    for label in range(3):
        right = ((predictions["label"] == label) & (predictions["prediction"] == label)).sum()
        each.append(2 * right / ((predictions["label"] == label).sum() + (predictions["prediction"] == label).sum()))
    assert result["score"] == pytest.approx(np.mean(each)) == result["scores"]["macro F1"]
    assert result["majority"] == pytest.approx(2 / 9)
    assert result["scores"]["accuracy"] == (predictions["label"] == predictions["prediction"]).mean()


def test_labels_with_gaps_make_a_head_of_as_many_classes(tmp_path: Path, model: str, runs: Path) -> None:
    labels = [3, 13, 23, 33, 43, 53] * 2
    folder = _folder(tmp_path, train={"text": [f"text {i}" for i in labels], "label": labels})
    run = Run.load(prepare(runs, _config(folder, model).to_json()))
    assert run.model.config.num_labels == 6
    assert "6 classes: 3, 13, 23, 33, 43, 53, accuracy of the majority 16.7" in describe(run.task)


def test_the_metric_changes_no_id_where_it_is_not_set(tmp_path: Path, model: str) -> None:
    from experiments.files import digest
    from experiments.runs.config import RunConfig
    from experiments.sweeps.file import CONF, read

    sweep = read(CONF / "sweeps" / "smoke.yaml")
    committed = pd.read_csv(Path(__file__).parents[3] / "results" / "sweeps" / "smoke" / "records.csv")
    lora = committed[(committed["projection"] == "lora") & (committed["train_seed"] == 1)].iloc[0]
    config = sweep.confirmations({"projection": "lora"}, {"lr": float(lora["lr"])})[0]
    assert lora["folder"] == f"vader/lora-{digest(config.to_json())}"
    assert RunConfig.from_json(config.to_json()) == config
    ranked = replace(config, metric="Matthews")
    assert ranked.metric == "Matthews" == RunConfig.from_json(ranked.to_json()).metric
    assert digest(ranked.to_json()) != digest(config.to_json())


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_line_ends_of_old_macs_end_lines(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"train{suffix}"
    _write(pd.DataFrame({"text": ["a b", "c"], "label": [0, 1]}), path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    assert read_file(tmp_path, "train").to_dict("list") == {"text": ["a b", "c"], "label": [0, 1]}


def test_line_ends_of_windows_belong_to_no_text(tmp_path: Path) -> None:
    for name, content in {
        "train.csv": 'text,label\r\n"two\r\nlines",1\r\nb,0\r\n',
        "train.tsv": "text\tlabel\r\ntwo lines\t1\r\nb\t0\r\n",
        "train.jsonl": '{"text": "two", "label": 1}\r\n{"text": "b", "label": 0}\r\n',
    }.items():
        (tmp_path / name).write_bytes(content.encode())
        rows = FORMATS[Path(name).suffix](tmp_path / name)
        assert rows["label"].tolist() == [1, 0] and rows["text"].iloc[1] == "b"


# ---- what would take the memory of a machine ------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            range(10_001),
            "/train: the column label must hold at most 10,000 classes, got 10,001 in 10,001 rows. An id is",
        ),
        (["a", "b" * 1001], "/train: label must be a text of at most 1,000 characters, got 1,001 in row 2. Shorten"),
        ([0.5, 1e39], r"/train: labels to regress must be finite in single precision, got 1e\+39 in row 2"),
        ([0.5, -1e39], r"/train: labels to regress must be finite in single precision, got -1e\+39 in row 2"),
        ([0.5, float("-inf")], "/train: labels must be all numbers, .* got -inf in row 2"),
        ([0, 10**400], r"/train: labels must be all numbers, .* got 10+\.\.\.0+ in row 2, while 1 of 2 are a number"),
        ([0, 2**63], "/train: labels must be all numbers, .* got 9223372036854775808 in row 2"),
    ],
    ids=["an id", "a text", "huge", "low", "infinite", "an integer of 401 digits", "an integer of 64 bits"],
)
def test_labels_that_no_head_or_loss_can_hold(labels: list, message: str, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"text {i}", "label": label}) + "\n" for i, label in enumerate(labels))
    for split in tasks.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(rows)
    with pytest.raises(ExperimentError, match=message) as error:
        tasks.get(str(tmp_path)).split("train")
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_the_most_and_the_longest_that_are_taken(tmp_path: Path) -> None:
    rows = {"text": ["a" * 1_000_000, *"bc"], "label": ["x" * 1000, "y", "y"]}
    task = tasks.get(str(_folder(tmp_path, train=rows)))
    assert len(task.split("train")["text"][0]) == 1_000_000 and len(task.classes[0]) == 1000
    many = {"text": [f"{i}" for i in range(10_000)], "label": [*range(-1, 9_999)]}
    assert len(tasks.get(str(_folder(tmp_path, train=many))).classes) == 10_000


@pytest.mark.parametrize("column", ["text", "prompt", "completion"])
def test_a_text_that_a_tokenizer_would_read_for_minutes(column: str, tmp_path: Path) -> None:
    other = {"text": {"label": [0, 1]}, "prompt": {"completion": ["b", "b"]}, "completion": {"prompt": ["a", "a"]}}
    rows = {column: ["short", "a" * 1_000_001], **other[column]}
    with pytest.raises(ExperimentError, match=f"train: {column} must be a text of at most 1,000,000 .* in row 2"):
        tasks.get(str(_folder(tmp_path, train=rows))).split("train")


@pytest.mark.parametrize(
    ("subset", "labels", "message"),
    [
        (
            "rte",
            [0, 1_000_000],
            "glue/rte/test: class labels must count from 0 and lie below 10,000, got 1000000 in row 2",
        ),
        ("rte", [0, -1], "glue/rte/test: class labels must count from 0, got -1. -1 marks hidden labels"),
        ("rte", [0, 10**400], "glue/rte/test: labels must be integers .classes. or floats .regression., got"),
        ("stsb", [0.5, float("inf")], "glue/stsb/test: labels to regress must be finite in single precision, got inf"),
        ("stsb", [0.5, 1e300], "glue/stsb/test: labels to regress must be finite in single precision, got 1e"),
    ],
)
def test_a_label_of_a_known_task_is_bounded_too(subset: str, labels: list, message: str, tmp_path: Path) -> None:
    """One label of 1,000,000 makes a head of as many outputs: 7.8 GB on a small encoder."""
    (tmp_path / "glue" / subset).mkdir(parents=True)
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in labels]
    file = tmp_path / "glue" / subset / "validation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ExperimentError, match=message):
        tasks.get(f"glue/{subset}", str(tmp_path)).split("test")

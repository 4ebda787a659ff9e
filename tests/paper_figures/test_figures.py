"""Tables and figures: published beside ours, gaps named, bad input refused, the same bytes each time."""

from __future__ import annotations

import ast
import io
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib.text
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure

import paper_figures.figures
import uniproj
from experiments.errors import ExperimentError
from paper_figures import comparison, published, registry, sizes, style
from paper_figures.__main__ import main, write
from paper_figures.committed import Committed
from paper_figures.figures import captured_energy
from paper_figures.figures.paper_scores import COMPARISONS
from paper_figures.registry import Product, makers, register
from paper_figures.typesetting import Table, tex
from tests.sweeps import made_up
from tests.sweeps import write as write_sweep

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "results"
TASKS = ["glue/sst2", "glue/mrpc", "glue/stsb", "glue/qnli"]
METHODS = ["lora", "unilora", "fastfood", "vera", "tied_lora", "vblora", "lora_xs"]
Made = Mapping[str, Sequence[Product]]
LARGE = next(spec for spec in COMPARISONS if spec.name == "glue_large")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results with one small made-up sweep."""
    return write_sweep(tmp_path / "results" / "sweeps" / "little", made_up(TASKS[:1], ["lora"])).parents[1]


@pytest.fixture
def table() -> pd.DataFrame:
    return made_up(TASKS, [*METHODS, "unilora_local", "unilora_nonuniform"])


@pytest.fixture(scope="module")
def made() -> Made:
    """Everything from the committed results, made once."""
    with style.use():
        committed = Committed(COMMITTED)
        products = {name: make(committed) for name, make in makers().items()}
    plt.close("all")
    return products


def _made(name: str, results: Path) -> Sequence[Product]:
    return makers()[name](Committed(results))


def _tables(made: Made) -> dict[str, Table]:
    return {name: product for name, products in made.items() for product in products if isinstance(product, Table)}


def _cells(table: Table, block: str, method: str) -> dict[str, str]:
    (row,) = [row for row in table.rows if row[0].startswith(block) and row[1] == method]
    return dict(zip(table.columns, row, strict=True))


def test_published_values_are_those_of_the_file_and_each_has_a_source() -> None:
    values, content = published.read(), yaml.safe_load(published.FILE.read_text())
    assert len(values) == sum(len(row["values"]) for row in content["rows"]) == 425
    assert set(values["table"]) == set(published.tables()) and values["source"].str.contains("github|arXiv").all()
    assert not values.duplicated(["table", "method", "trained", "column", "d", "r", "lr"]).any()
    assert set(values["projection"].dropna()) <= set(uniproj.names())
    cell = values[(values["table"] == "glue_base") & (values["method"] == "VeRA") & (values["column"] == "CoLA")].iloc[
        0
    ]
    assert (cell["value"], cell["sd"], cell["n"], cell["text"]) == (65.6, 0.8, 5, "65.6 ± 0.8")
    # an average is that of its row, rounded to one or two digits, or in doubt
    averaged = values[values["table"].isin(values[values["column"] == "average"]["table"])]
    rows = averaged.pivot(index=["table", "method", "trained"], columns="column", values="value")
    wrong = rows[(rows.drop(columns="average").mean(axis=1) - rows["average"]).abs() > 0.0501]
    doubted = values[(values["column"] == "average") & values["doubt"].notna()]
    assert len(rows) == 40 and list(wrong.index.get_level_values("method")) == list(doubted["method"]) == ["Uni-LoRA"]
    # what is said to repeat a cell of the smaller model does
    for cell in values[values["doubt"] == "repeats the cell of ViT-B"].itertuples():
        own = (values["method"] == cell.method) & (values["column"] == cell.column) & (values["table"] == "vision_base")
        assert set(values[own]["text"]) == {cell.text}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "source: notes,",
            "source: hearsay,",
            r"row 15 .* must name one of the sources notes, .*, got 'hearsay'\. Add",
        ),
        (", source: notes,", ",", r"must have the keys .* others or lacks them: source\. Repair"),
        (", source: notes,", ", sd: 1, source: notes,", "others or lacks them: sd"),
        ('trained: "125M", ', "", "others or lacks them: trained"),
        ("table: glue_base,", "table: glue_huge,", "must name one of the tables .*, got 'glue_huge'"),
        ("values: {SST-2:", "values: {SST2:", "must name one of the columns SST-2, .*, got 'SST2'"),
        ("doubtful: {average:", "doubtful: {Average:", "must name one of the columns .*, got 'Average'"),
        ("SST-2: 94.8", "SST-2: .nan", "SST-2 must be a finite number, .*, got nan"),
        ("SST-2: 95.1 ± 0.2", "SST-2: 95.1 ± -0.2", "deviation of 0 or more, got '95.1 ± -0.2'"),
        ("SST-2: 95.1 ± 0.2", "SST-2: 95.1 ± some", "deviation of 0 or more, got '95.1 ± some'"),
        ("n: 5,", "n: 0,", "must have an integer n of at least 1, got 0"),
        ("d: 262144,", "d: 2.5,", "must have an integer d of at least 1, got 2.5"),
        ("lr: 0.002,", "lr: 2e-3,", "must have a learning rate lr above 0, got '2e-3'. Write it as 0.001"),
    ],
)
def test_a_published_row_that_is_none_is_a_sentence(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = published.FILE.read_text()
    assert old in text
    (tmp_path / "published.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ExperimentError, match=message) as raised:
        published.read(tmp_path / "published.yaml")
    assert "\n" not in str(raised.value)


def test_published_and_ours_stand_side_by_side_and_gaps_are_named(results: Path, table: pd.DataFrame) -> None:
    write_sweep(results / "sweeps" / "glue_budget", table)
    found, _ = _made("glue_large", results)
    theirs = _cells(found, "published", "Uni-LoRA")
    assert theirs["SST-2, %"] == "96.3 ± 0.2" and theirs["trained"] == "0.023M"
    assert theirs["average, x 100"] == "88.3 (?)" and any("cells is 88.23" in note for note in found.notes)
    # a correlation is no percentage
    assert {*found.columns} >= {"STS-B, Pearson x 100", "CoLA, Matthews x 100"} and "STS-B, %" not in found.columns
    # a block or a method without a number has no row, and one line names all of them
    assert {row[0] for row in found.rows} == {"published, RoBERTa-large", "ours, MiniLM-L6 at one budget"}
    assert "Without a number: ours, RoBERTa-large, all methods: not run." in found.notes
    ours = _cells(found, "ours, MiniLM", "Uni-LoRA")
    own = table[(table["task"] == TASKS[0]) & (table["projection"] == "unilora")]["score"]
    assert ours["SST-2, %"].startswith(f"{100 * own.mean():.1f} [") and ours["SST-2, %"].endswith("(n = 3)")
    assert ours["CoLA, Matthews x 100"] == "not run" and ours["trained"] == "4,741"
    assert any("a transcription by third parties" in note for note in found.notes)


def test_a_method_of_ones_own_is_in_every_table_and_figure(results: Path) -> None:
    """Nothing here knows these names: they are what the data hold."""
    own = made_up([*TASKS, "glue/cola", "glue/rte"], ["peft/fourierft", "full", "unilora", "unilora_mine"])
    write_sweep(results / "sweeps" / "glue_budget", own)
    for name, wanted in (("glue_base", ["Uni-LoRA", "full fine-tuning", "FourierFT", "unilora_mine"]),
                         ("ablations", ["Uni-LoRA", "unilora_mine"])):  # fmt: skip
        found, figure = _made(name, results)
        mine = [row[1] for row in found.rows if row[0] in ("ours, MiniLM-L6 at one budget", "ours, score")]
        assert sorted(mine) == sorted(wanted), name
        labels = {text.get_text() for axes in figure.axes for text in axes.get_yticklabels()}
        assert {*wanted} - {"Uni-LoRA"} <= labels
        plt.close(figure)
    # with all six tasks there is an average
    (row,) = [row for row in _made("glue_base", results)[0].rows if row[1] == "full fine-tuning"]
    assert row[-1].endswith("(n = 3)")
    plt.close("all")


def test_ours_of_one_of_two_models_stand_beside_those_published_of_it(results: Path) -> None:
    images = ["pets", "cars", "cifar10", "dtd", "eurosat", "fgvc", "resisc45", "cifar100"]
    own = made_up(images, ["unilora"], model="google/vit-base-patch16-224-in21k")
    write_sweep(results / "sweeps" / "vision", own)
    (base, first), (large, second) = _made("vision_base", results), _made("vision_large", results)
    cells = list(_cells(base, "ours, ViT-B", "Uni-LoRA").values())[3:]
    means = [own[own["task"] == task]["score"].mean() for task in images]
    assert [cell.split(" [")[0] for cell in cells] == [f"{100 * mean:.1f}" for mean in (*means, sum(means) / 8)]
    assert not any(row[0].startswith("ours") for row in large.rows)
    assert "Without a number: ours, ViT-L, all methods: not run." in large.notes
    plt.close(first)
    plt.close(second)


def test_a_method_without_a_number_is_named_below(results: Path, table: pd.DataFrame) -> None:
    table.loc[table["projection"] == "vera", "did_not_train"] = "the loss rose"
    write_sweep(results / "sweeps" / "glue_budget", table)
    found, figure = _made("glue_large", results)
    assert not any("MiniLM" in row[0] and row[1] == "VeRA" for row in found.rows)
    (line,) = [note for note in found.notes if note.startswith("Without a number")]
    assert "ours, MiniLM-L6 at one budget, VeRA: did not train / not run" in line
    plt.close(figure)


def test_a_standard_deviation_is_drawn_and_a_doubtful_cell_is_marked(made: Made) -> None:
    found, figure = made["vision_large"]
    assert figure.axes[0]._left_title.get_text() == " "
    heads = [text.get_text() for text in figure.axes[0].texts]
    assert heads == ["published, ViT-L: n = 5 seeds, mean and standard deviation"]
    pets, cifar10 = figure.axes[0], figure.axes[2]
    ends = [segment[:, 0] for lines in pets.collections for segment in lines.get_segments()]
    assert any(end == pytest.approx([91.11 - 0.30, 91.11 + 0.30]) for end in ends)
    assert [(text.get_text(), text.xy) for text in cifar10.texts] == [("?", (98.77, 4))]
    assert _cells(found, "published", "Linear probing")["CIFAR-100, %"] == "84.28 ± 0.11 (?)"


def test_a_grid_of_rates_has_a_line_for_each_size_and_each_rate(made: Made) -> None:
    (rates,), (scan, against) = made["learning_rates"], made["score_against_d"]
    (line,) = [line for line in rates.axes[0].lines if line.get_label() == "Uni-LoRA, 524,288"]
    assert list(line.get_xdata()) == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.01]
    assert list(line.get_ydata()) == [68.39, 72.33, 73.84, 74.15, 74.75, 72.40]
    (line,) = [line for line in against.axes[0].lines if line.get_label() == "Uni-LoRA, lr 0.002"]
    assert list(line.get_ydata()) == [70.28, 73.84, 75.44, 76.95, 76.12]
    assert sum(row[0] == "published" for row in scan.rows) == 36
    assert ["published", "LoRA", "167,772,160", "0.0002", "MATH500", "33.20"] in scan.rows


def test_a_table_without_rows_is_its_notes(results: Path) -> None:
    for name in ("ablations", "score_against_rows", "intrinsic_dimension", "fastfood"):
        found, figure = _made(name, results)
        assert not found.rows and "not run" in found.markdown() and "|" not in found.markdown()
        assert "tabular" not in found.latex() and r"\par" in found.latex()
        plt.close(figure)


def test_failed_and_stuck_runs_are_words_and_not_numbers(results: Path, table: pd.DataFrame) -> None:
    first = (table["task"] == TASKS[0]) & (table["train_seed"] == 1)
    table.loc[first & (table["projection"] == "vera"), "failed"] = "out of memory"
    table.loc[first & (table["projection"] == "unilora"), "did_not_train"] = "the loss rose"
    write_sweep(results / "sweeps" / "glue_budget", table)
    found, _ = _made("glue_large", results)
    assert _cells(found, "ours, MiniLM", "VeRA")["SST-2, %"] == "failed"
    assert _cells(found, "ours, MiniLM", "Uni-LoRA")["SST-2, %"] == "only 2 of 3 trained"


def _second_of_vera(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["projection"] == "vera") & (table["task"] == TASKS[1])].index[:1]


@pytest.mark.parametrize(
    ("sweep", "change", "product", "message"),
    [
        ("glue_budget", lambda table: table.drop(index=_second_of_vera(table)), "glue_large",
         "must have 3 runs, got 2 of vera on glue/mrpc"),
        ("glue_budget", lambda table: table.assign(score=table["score"].where(table.index != 3)), "fastfood",
         "must be a finite number"),
        ("score_against_d", lambda table: table, "score_against_d", "must show one task, got glue/mrpc, glue/qnli"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_shown_stop_with_a_sentence(
    sweep: str, change: Callable, product: str, message: str, results: Path, table: pd.DataFrame, capsys
) -> None:
    write_sweep(results / "sweeps" / sweep, change(table))
    assert main(["--results", str(results), "--out", str(results / "out"), "--only", product]) == 2
    assert message in capsys.readouterr().err and not (results / "out").exists()


def test_two_cells_for_one_place_stop_with_a_sentence(results: Path, table: pd.DataFrame) -> None:
    again = table[table["projection"] == "unilora"].assign(d=100)
    write_sweep(results / "sweeps" / "glue_budget", pd.concat([table, again.assign(folder=again["folder"] + "b")]))
    with pytest.raises(ExperimentError, match="must be one cell of a sweep, got 2"):
        comparison.rows(LARGE, Committed(results))


def test_a_broken_analysis_table_and_an_unknown_name_stop_with_a_sentence(results: Path, capsys) -> None:
    (results / "overhead").mkdir()
    (results / "overhead" / "overhead-kernel.csv").write_text("a,b\n1,2\n")
    assert main(["--results", str(results), "--out", str(results.parent / "out"), "--only", "bandwidth_floor"]) == 2
    assert "must have the columns ['both_per_copy', 'case'" in capsys.readouterr().err
    assert main(["--results", str(results), "--out", str(results.parent / "out"), "--only", "glue_huge"]) == 2
    assert "['glue_huge'] must be names of" in capsys.readouterr().err


def test_equal_sizes_stand_side_by_side_in_the_order_of_size() -> None:
    places = sizes._beside(pd.Series([100.0, 100.0, 100.0, 5000.0]))
    assert places == sorted(places) and len(set(places)) == 4
    assert places[1] == pytest.approx(100) and places[3] == 5000


def test_markdown_and_latex_hold_the_same_cells() -> None:
    made = Table("50 % of A_B", ["x|y", "score, %"], [["P^T P - I", "1.0 ± 0.1"]], ["n = 3 & more"])
    assert r"| P^T P - I | 1.0 ± 0.1 |" in made.markdown() and r"x\|y" in made.markdown()
    assert r"P\textasciicircum{}T P - I & 1.0 $\pm$ 0.1 \\" in made.latex()
    assert r"50 \% of A\_\allowbreak{}B" in made.latex()


def test_every_projection_is_in_the_table_of_properties(made: Made) -> None:
    (found,) = made["properties"]
    assert [row[1] for row in found.rows] == uniproj.names() and found.rows[-1][0] == "VeRA"
    rows = {row[1]: dict(zip(found.columns, row, strict=True)) for row in found.rows}
    isometric = next(column for column in found.columns if column.startswith("isometric"))
    assert rows["unilora"][isometric] == "yes: 0" and rows["unilora_unnormalised"][isometric].startswith("no: ")


def test_everything_is_drawn_from_the_committed_results(made: Made) -> None:
    tables_alone = {"measured_properties", "properties"}
    figures = {name: [each for each in products if isinstance(each, Figure)] for name, products in made.items()}
    assert {name for name, own in figures.items() if not own} == tables_alone
    for figure in (each for own in figures.values() for each in own):
        figure.savefig(io.BytesIO(), dpi=15)
    pages = [table.markdown() for table in _tables(made).values()]
    assert not any(re.search(r"\b(nan|None)\b", page) for page in pages)


def test_each_table_and_figure_is_two_files(made: Made, tmp_path: Path) -> None:
    (tmp_path / "properties.png").write_text("of an earlier call")
    names = ["vision_large", "properties"]
    write(Committed(COMMITTED), {name: lambda _, own=made[name]: own for name in names}, tmp_path)
    wanted = {f"{name}.{kind}" for name in names for kind in ("md", "tex")} | {"vision_large.png", "vision_large.pdf"}
    assert {path.name for path in tmp_path.iterdir()} == wanted
    assert "ViT-Large" in (tmp_path / "vision_large.md").read_text()


@pytest.mark.parametrize("names", [["fastfood"], pytest.param(None, marks=pytest.mark.slow)])
def test_the_same_results_give_the_same_bytes(tmp_path: Path, names: list[str] | None) -> None:
    for out in ("one", "two"):
        known = makers()
        write(Committed(COMMITTED), {name: known[name] for name in names or known}, tmp_path / out)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_scans_of_rows_and_of_d_are_shown_with_their_d90(results: Path) -> None:
    rows = made_up(["glue/sst2"], ["lora", "unilora"])
    write_sweep(results / "sweeps" / "score_against_rows", rows)
    shared = {"score_on": "test", "data": "hub", "test_size": None, "epochs": 3, "max_length": 64, "dtype": "float32"}
    # always 0.5; LoRA reaches 0.7: 90 % of the gain is 0.68, which 100 numbers miss and 4,741 reach
    scores = {"lora": 0.7, "unilora": 0.69}
    large = rows.assign(**shared, label_noise=0.0, base_dtype="float32", score=rows["projection"].map(scores))
    small = large[large["projection"] == "unilora"].assign(d=100, trained=100, score=0.6)
    whole = pd.concat([large, small.assign(folder=small["folder"] + "s")], ignore_index=True)
    write_sweep(results / "sweeps" / "score_against_d", whole)
    scan, figure = _made("score_against_rows", results)
    assert [row[2:4] for row in scan.rows] == [["800", "0.01"]] * 2 and len(figure.axes) == 1
    table, drawn = _made("intrinsic_dimension", results)
    (own,) = [row for row in table.rows if row[1] == "Uni-LoRA"]
    assert int(own[2].replace(",", "")) == pytest.approx(100 * 47.41 ** (0.08 / 0.09), abs=1)
    assert [line.get_ydata()[0] for line in drawn.axes[0].lines if len(set(line.get_ydata())) == 1][
        -2:
    ] == pytest.approx([68, 50])
    plt.close("all")
    lost = whole.drop(index=whole.index[-1])
    write_sweep(results / "sweeps" / "score_against_d", lost)
    with pytest.raises(ExperimentError, match="must have 3 runs, got 2 of unilora"):
        _made("intrinsic_dimension", results)


def test_a_cell_that_is_not_drawn_is_named(results: Path, table: pd.DataFrame) -> None:
    own = table[table["task"] == TASKS[0]].copy()
    own.loc[(own["projection"] == "vera") & (own["train_seed"] == 1), "did_not_train"] = "the loss rose"
    # an interval far beyond what an accuracy can be
    own.loc[own["projection"] == "lora", "score"] = [0.1, 0.9, 0.99]
    write_sweep(results / "sweeps" / "score_against_rows", own)
    _, figure = _made("score_against_rows", results)
    axes = figure.axes[0]
    (text,) = axes.texts
    assert text.get_text() == "VeRA: only 2 of 3 trained"
    ends = [y for lines in axes.collections for segment in lines.get_segments() for _, y in segment]
    figure.canvas.draw()
    assert max(ends) <= axes.transData.inverted().transform(text.get_window_extent())[:, 1].min()
    plt.close(figure)


def test_of_several_sizes_those_that_did_not_train_are_named(results: Path, table: pd.DataFrame) -> None:
    large = table[table["task"] == TASKS[0]]
    small = large.assign(train_size=50, folder=large["folder"] + "s")
    small.loc[small["projection"].isin(["vera", "lora"]), "did_not_train"] = "the loss rose"
    small.loc[(small["projection"] == "fastfood") & (small["train_seed"] == 1), "did_not_train"] = "the loss rose"
    write_sweep(results / "sweeps" / "score_against_rows", pd.concat([large, small], ignore_index=True))
    found, figure = _made("score_against_rows", results)
    (panel,) = figure.axes
    assert {text.get_text() for text in panel.texts} == {
        "LoRA at 50, VeRA at 50: did not train", "Fastfood at 50: only 2 of 3 trained",
    }  # fmt: skip
    (line,) = [note for note in found.notes if note.startswith("Without a number")]
    assert line.split(": ", 1)[1].rstrip(".").split("; ") == [
        "ours, MiniLM-L6, Fastfood, 50: only 2 of 3 trained",
        "ours, MiniLM-L6, LoRA, 50: did not train",
        "ours, MiniLM-L6, VeRA, 50: did not train",
    ]
    plt.close(figure)


def test_points_of_one_size_are_not_joined_and_sweeps_of_something_else_have_no_panel(
    made: Made, results: Path
) -> None:
    (figure,) = made["score_against_bytes"]
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert any("glue_budget" in title for title in titles) and not any("rows" in title for title in titles)
    rows = made_up(TASKS[:1], ["lora"])
    again = rows.assign(train_size=50, score=rows["score"] - 0.1, folder=rows["folder"] + "s")
    write_sweep(results / "sweeps" / "mine", pd.concat([rows, again]))
    figure, axes = plt.subplots()
    sizes.against(axes, Committed(results).sweep("mine").cells, "adapter_bytes", "stored bytes")
    assert max(len(line.get_xdata()) for line in axes.lines) == 1
    plt.close(figure)


def test_sizes_of_measured_properties_are_whole_numbers(made: Made) -> None:
    (found,) = made["measured_properties"]
    rows = {row[0]: row for row in found.rows}
    own = rows["Uni-LoRA"]
    assert own[1:3] == ["4,096 x 1,024", "isometric"] and own[6] == "36,864 x 1,024" and "LoRA-XS (side=A)" in rows
    assert not any("." in row[1] for row in found.rows)


def test_pictures_of_analyses_are_drawn_from_their_tables_or_named_as_not_run(results: Path) -> None:
    for name in ("spectrum", "landscape"):
        (figure,) = _made(name, results)
        assert figure.axes[0].texts[0].get_text() == f"{name}: not run"
        plt.close(figure)
    (results / "spectrum").mkdir()
    (results / "spectrum" / "spectrum-spectrum.csv").write_text("projection,sigma\nunilora,1\n")
    with pytest.raises(ExperimentError, match="must have the columns \\['D', 'd'"):
        _made("spectrum", results)


def test_a_landscape_is_drawn_from_its_tables(results: Path) -> None:
    norms = [
        {"projection": name, "D": 4096, "d": 64, "mean": mean, "least": 0.1, "largest": 0.3, "random": 0.125,
         "isometric": name == "unilora", "n": 4}
        for name, mean in (("unilora", 0.2), ("vera", 0.15), ("nola", None))
    ]  # fmt: skip
    losses = [
        {"projection": name, "direction": k, "t": t, "loss": 0.7}
        for name in ("unilora", "vera") for k in range(2) for t in (-1, 0, 1)
    ]  # fmt: skip
    (results / "landscape").mkdir(exist_ok=True)
    for key, rows in (("gradients", norms), ("losses", losses)):
        pd.DataFrame(rows).to_csv(results / "landscape" / f"landscape-{key}.csv", index=False)
    (figure,) = _made("landscape", results)
    above, below = figure.axes
    assert [text.get_text() for text in above.get_yticklabels()] == ["Uni-LoRA", "VeRA *"]
    # the lines of the lower panel have a legend
    named = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert (
        len(below.lines) == 2
        and {"Uni-LoRA", "VeRA"} <= set(named)
        and above.get_title(loc="left") == "D = 4,096, d = 64"
    )
    plt.close(figure)


def test_captured_energy_is_drawn_against_a_random_subspace() -> None:
    rows = [
        {"projection": name, "random": d / 36864, "factor": d / 36864, "delta_W": d / 40000, "fisher": None, "D": 36864}
        for name in ("unilora", "fastfood")
        for d in (64, 512, 4096)
    ]
    figure = captured_energy.draw(pd.DataFrame(rows).astype({"fisher": float}))
    factor, delta, fisher = figure.axes
    # a line for each method, named at its side: none hides another
    assert [text.get_text() for text in factor.get_yticklabels()] == ["Uni-LoRA", "Fastfood"]
    for axes, part in ((factor, 36864), (delta, 40000)):
        for place, name in enumerate(("unilora", "fastfood")):
            own = [line for line in axes.lines if line.get_ydata()[0] == place]
            reached = [line.get_xdata()[0] for line in own if line.get_marker() == style.marker(name)]
            random = [line.get_xdata()[0] for line in own if line.get_marker() == "|"]
            assert reached == pytest.approx([d / part for d in (64, 512, 4096)])
            assert random == pytest.approx([d / 36864 for d in (64, 512, 4096)])
    assert [text.get_text() for text in fisher.texts] == ["not run"]
    plt.close(figure)
    nothing = captured_energy.draw(None)
    assert nothing.axes[0].texts[0].get_text() == "captured energy: not run"
    plt.close(nothing)


def test_a_check_of_the_machinery_is_no_study(made: Made) -> None:
    assert (COMMITTED / "sweeps" / "smoke" / "records.csv").exists()
    studies = [sweep.name for sweep in Committed(COMMITTED).sweeps]
    assert "smoke" not in studies and len(studies) >= 3
    for figure in (*made["learning_curves"], *made["score_against_bytes"]):
        titles = [axes.get_title() for axes in figure.axes]
        assert titles and not any("smoke" in title or "reviews" in title for title in titles)


def test_a_curve_leaves_out_what_did_not_train_and_says_so(results: Path, table: pd.DataFrame) -> None:
    first = (table["task"] == TASKS[0]) & (table["projection"] == "vera") & (table["train_seed"] == 1)
    table.loc[first, "did_not_train"] = "the loss rose"
    write_sweep(results / "sweeps" / "glue_budget", table)
    (figure,) = _made("learning_curves", results)
    (panel,) = [axes for axes in figure.axes if axes.get_title() == "SST-2 (glue_budget)"]
    assert [text.get_text() for text in panel.texts] == ["VeRA: 1 of 3 did not train, left out"]
    plt.close(figure)


def test_methods_tasks_and_models_are_called_by_one_table_of_names(made: Made) -> None:
    settings = [*uniproj.names(), *(f"glue/{task}" for task in ("sst2", "stsb", "mrpc", "qnli")), "minilm", "smollm2"]
    wrong = re.compile(rf"(?<![\w`/.(])({'|'.join(map(re.escape, settings))}|sst2|stsb)(?![\w`=]| CSR)")
    for name, products in made.items():
        for product in products:
            if isinstance(product, Table):
                # the table of properties has a column of the names in settings
                cells = [cell for row in product.rows for k, cell in enumerate(row) if product.columns[k] != "name"]
                texts = [product.title, *product.columns, *cells]
            else:
                texts = [text.get_text() for text in product.findobj(matplotlib.text.Text)]
            found = [text for text in texts if "$" not in text and wrong.search(text)]
            assert found == [], (name, found)


def test_correlations_are_no_percentages(made: Made) -> None:
    heads = [head for product in _tables(made).values() for head in product.columns]
    assert not any("STS-B" in head and "%" in head for head in heads)
    assert sum("STS-B, Pearson x 100" in head for head in heads) >= 3
    labels = [axes.get_ylabel() for figure in made["score_against_bytes"] for axes in figure.axes]
    assert "Pearson x 100" in labels and "Pearson, %" not in labels


@pytest.mark.parametrize("name", ["nowhere", "empty", "runs"])
def test_results_without_sweeps_stop_with_a_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / name
    if name != "nowhere":
        folder.mkdir()
    if name == "runs":
        write_sweep(folder / "glue_budget", made_up(TASKS[:1], ["lora"]))
    assert main(["--results", str(folder), "--out", str(tmp_path / "out"), "--only", "ablations"]) == 2
    error = capsys.readouterr().err
    assert f"{folder} must hold sweeps/<name>/records.csv" in error and "Pass the folder above" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("theta_D[i] = theta_d[index[i]] / sqrt(n)", r"\theta _{D}[i] = \theta _{d}[\mathrm{index}[i]] / \sqrt{n}"),
        ("max|P^T P - I|", r"\max \vert P^{T}\,\allowbreak P - I\vert "),
        ("B = diag(lambda_b) B_hat", r"B = \mathrm{diag}(\lambda _{b})\,\allowbreak \hat{B}"),
        ("1,024 x 120", r"1{,}024\,\allowbreak \times \,\allowbreak 120"),
    ],
)
def test_formulas_are_set_in_math_mode(formula: str, expected: str) -> None:
    assert tex(f"of ${formula}$") == f"of ${expected}$"


def test_tables_are_latex_that_fits_the_page(made: Made, tmp_path: Path) -> None:
    tables = _tables(made)
    for name, table in tables.items():
        table.write(tmp_path / name)
        text = table.latex()
        outside = re.sub(r"\$[^$]*\$", "", text.replace(r"\$", ""))
        assert "$" not in outside and not re.search(r"theta|lambda|P\^T|\bsqrt\(", outside), name
        depth = 0
        for brace in re.findall(r"(?<!\\)[{}]", text):
            depth += 1 if brace == "{" else -1
            assert depth >= 0
        assert depth == 0 and text.count(r"\begin{") == text.count(r"\end{")
        shares = [float(share) for share in re.findall(r"dimexpr ([\d.]+)\\linewidth", text)]
        assert sum(shares) <= 1.005 and len(shares) >= 3
    if (compiler := shutil.which("pdflatex")) is None:
        pytest.skip("no pdflatex is installed: the tables were not compiled (Debian: texlive-latex-recommended)")
    inputs = "".join(rf"\input{{{name}.tex}}\clearpage" for name in tables)
    packages = r"\documentclass{article}\usepackage{array,booktabs,longtable,lscape}"
    (tmp_path / "all.tex").write_text(rf"{packages}\begin{{document}}{inputs}\end{{document}}")
    done = subprocess.run(
        [compiler, "-halt-on-error", "-interaction=nonstopmode", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout and "too large" not in done.stdout


def test_what_a_table_cites_is_there(made: Made) -> None:
    notes = [note for table in _tables(made).values() for note in table.notes]
    cited = {file for note in notes for file in re.findall(r"docs/\w+\.md", note)}
    assert cited and all((ROOT / file).is_file() for file in cited)
    for file, section in (pair for note in notes for pair in re.findall(r"(docs/\w+\.md), section '([^']+)'", note)):
        assert f"## {section}\n" in (ROOT / file).read_text()


def test_nothing_is_computed_where_figures_are_drawn() -> None:
    banned = {"mean", "std", "var", "sem", "median", "quantile", "ppf", "interval", "t_interval", "bootstrap"}
    for path in sorted((ROOT / "paper_figures").rglob("*.py")):
        tree = ast.parse(path.read_text())
        assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & banned, path


def test_a_figure_of_ones_own_may_return_one_thing_and_another_thing_is_refused(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"one": Table("One", ["a"], [["1"]]), "none": None, "words": ["no table"]}
    known = {name: lambda _, found=found: found for name, found in made.items()}
    monkeypatch.setattr("paper_figures.__main__.makers", lambda: known)
    asked = ["--results", str(results), "--out", str(tmp_path / "out"), "--only"]
    for name, found in (("none", "NoneType"), ("words", "str")):
        assert main([*asked, "one", name]) == 2 and not (tmp_path / "out").exists()
        assert f"figures: {name} must return tables and figures, got a {found}" in capsys.readouterr().err
    assert main([*asked, "one"]) == 0 and "| 1 |" in (tmp_path / "out" / "one.md").read_text()


@pytest.mark.parametrize("where", ["figures", "plugin", "entry point"])
def test_one_new_file_is_a_new_figure_and_a_new_table(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the page on figures: among ours, in a file that the command names, and in somebody else's package."""
    monkeypatch.setattr(registry, "_makers", dict(registry._makers))
    (new,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "figures.md").read_text(), re.DOTALL)
    home, options = tmp_path / "home", []
    home.mkdir()
    (home / "a_figure_of_mine.py").write_text(new)
    if where == "figures":
        monkeypatch.setattr(paper_figures.figures, "__path__", [*paper_figures.figures.__path__, str(home)])
    elif where == "plugin":
        options = ["--plugins", str(home / "a_figure_of_mine.py")]
    else:
        monkeypatch.syspath_prepend(home)
        (home / "somebodys-1.0.dist-info").mkdir()
        named = "[uniproj.figures]\nsizes_of_sweeps = a_figure_of_mine:make\nbroken = no_such_module:make\n"
        (home / "somebodys-1.0.dist-info" / "entry_points.txt").write_text(named)
    write_sweep(tmp_path / "sweeps" / "little", made_up(TASKS[:1], ["lora"]))
    asked = ["--results", str(tmp_path), "--only", "sizes_of_sweeps", "--out", str(tmp_path / "out"), *options]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main(asked) == 0
    broken = "uniproj.figures: 'broken' of no_such_module:make cannot be loaded"
    assert any(broken in str(each.message) for each in said) == (where == "entry point")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"sizes_of_sweeps.{kind}" for kind in ("pdf", "png", "md", "tex")
    }
    assert "| little | 3 |" in (tmp_path / "out" / "sizes_of_sweeps.md").read_text()
    assert (tmp_path / "out" / "sizes_of_sweeps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ExperimentError, match=r"'sizes_of_sweeps' must be free, got that of .*a_figure_of_mine"):
        register("sizes_of_sweeps")(test_one_new_file_is_a_new_figure_and_a_new_table)
    for name in [name for name in sys.modules if "a_figure_of_mine" in name]:
        del sys.modules[name]

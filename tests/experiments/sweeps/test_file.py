"""Sweep files: which runs they ask for, and what is refused before anything is trained."""

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from experiments.errors import ExperimentError
from experiments.files import digest, write_json
from experiments.sweep import main
from experiments.sweeps import preflight
from experiments.sweeps.file import CONF, read

ROOT = Path(__file__).parents[3]
BASE = "settings: {{task: {task}, model: {model}, lr: 0.01, budget: 200}}\n"


@pytest.fixture
def write(tmp_path: Path, task: str, model: str):
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(BASE.format(task=task, model=model) + text)
        return path

    return write


def test_axes_are_crossed_and_every_cell_has_the_same_trials(write) -> None:
    sweep = read(
        write(
            "axes: {projection: [lora, unilora], r: [2, 4], label_noise: [0.0, 0.2]}\n"
            "tune: {seeds: [0, 1], lr: [1e-3, 1e-2, 1e-1]}\nseeds: [2, 3, 4]\n"
        )
    )
    cells = sweep.cells()
    assert len(cells) == 2 * 2 * 2 and {len(sweep.trials(cell)) for cell in cells} == {6}
    trials, confirmed = sweep.trials(cells[0]), sweep.confirmations(cells[0], {"lr": 0.5})
    assert {t.score_on for t in trials} == {"validation"} and {c.score_on for c in confirmed} == {"test"}
    assert [(c.projection_seed, c.init_seed, c.data_seed, c.train_seed) for c in confirmed] == [
        (s,) * 4 for s in (2, 3, 4)
    ]
    assert {c.lr for c in confirmed} == {0.5}


def test_whatever_is_compared_can_be_an_axis(write) -> None:
    axes = {
        "projection": ["unilora", "fastfood"], "d": [64, 128], "r": [2, 4], "lr": [0.1, 0.2], "train_size": [32, 64],
        "label_noise": [0.0, 0.1], "target_modules": [["query"], ["query", "value"]], "projection_seed": [7, 8],
    }  # fmt: skip
    sweep = read(write(f"axes: {json.dumps(axes)}\n"), ["~settings.budget", "~settings.lr"])
    runs = [run for cell in sweep.cells() for run in sweep.confirmations(cell, {})]
    assert len({digest(run.to_json()) for run in runs}) == 2 ** len(axes)
    for name, values in axes.items():
        assert sorted(getattr(run, name) for run in runs) == sorted(values * 2 ** (len(axes) - 1))


def test_one_of_the_four_seeds_can_be_an_axis(write) -> None:
    sweep = read(write("axes: {projection: [unilora], projection_seed: [7, 8]}\nseeds: [1]\n"))
    runs = [sweep.confirmations(cell, {})[0] for cell in sweep.cells()]
    assert [(r.projection_seed, r.train_seed) for r in runs] == [(7, 1), (8, 1)]


def test_a_budget_is_met_by_every_projection_or_its_error_is_known(write) -> None:
    sweep = read(write("axes: {projection: [unilora, fastfood], budget: [150, 300]}\n"))
    assert [c.d for cell in sweep.cells() for c in sweep.confirmations(cell, {})] == [150, 300, 150, 300]


def test_overrides_and_shared_settings_compose(write) -> None:
    path = write("axes: {projection: [lora]}\n")
    assert read(path, ["settings.lr=0.5"]).settings["lr"] == 0.5
    path.write_text("defaults: [{/settings: minilm}, _self_]\nsettings: {r: 8}\naxes: {projection: [lora]}\n")
    settings = read(path).settings
    assert settings["model"] == "minilm" and settings["r"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axis: {projection: [lora]}", r"unknown keys \['axis'\]. Known: name, settings, axes"),
        ("axes: {projection: lora}", "axes.projection must be a list of values, got 'lora'"),
        ("seeds: [0, 1]\ntune: {seeds: [1], lr: [0.1]}", r"must be fresh, got \[1\]"),
        ("tune: {lr: [0.1]}", "tune needs `seeds`"),
        ("seeds: []", "seeds must hold at least one value"),
        ("axes: {projection: [lora}", "must be a sweep"),
        ("axes: [projection]", r"axes must be a mapping, got \['projection'\]"),
        ("tune: [0.1]", r"tune must be a mapping or null, got \[0.1\]"),
        ("tune: {seeds: 0, lr: [0.1]}", "tune.seeds must be a list of values, got 0"),
        ("seeds: 3", "seeds must be a list of values, got 3"),
        ("seeds: [true]", r"seeds\[0\] must be an integer, got True"),
        ("cases: {projection: lora}", "cases must be a list of values"),
        ("cases: [lora]", r"cases\[0\] must be a mapping, got 'lora'"),
        ("launcher: fast", "launcher must be a mapping, got 'fast'"),
        ("launcher: {local: null}", "launcher.local must be a mapping, got None"),
        ("axes: {lr: [.nan]}", r"axes.lr\[0\] must be .* a finite number, .* got nan"),
        ("name: 5", "name must be text, got 5"),
        ("name: ../../evil", "name must be that of one folder, got '../../evil'"),
        ("name: ..", "name must be that of one folder"),
        (r'name: "a\0b"', "name must be that of one folder"),
        ("defaults: [mine, _self_]", "must be a sweep, got: maximum recursion depth"),
        ("1: 2\naxis: 3", r"unknown keys \[1, 'axis'\]"),
        ("axes: {projection: []}", "axes.projection must hold at least one value"),
        ("cases: []", "cases must hold at least one value"),
        ("axes: {projection: [lora, lora]}", "axes.projection must hold each value once, got 'lora' twice"),
        ("seeds: [1, 1]", "seeds must hold each value once, got 1 twice"),
        ("tune: {seeds: [2], lr: [0.1, 0.1]}", "tune.lr must hold each value once"),
        ("axes: {lr: [0.1]}\ntune: {seeds: [2], lr: [0.2]}", "lr must stand in one of axes, cases and tune"),
        ("axes: {seed: [3]}", "seed must be left to the sweep"),
    ],
)
def test_broken_sweeps_are_refused(write, text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        read(write(text))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("null", "settings must be a mapping, got None"),
        ("[1]", r"settings must be a mapping, got \[1\]"),
        ("{seed: 3}", "seed must be left to the sweep"),
    ],
)
def test_broken_settings_are_refused(tmp_path: Path, settings: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"settings: {settings}\naxes: {{projection: [lora]}}\n")
    with pytest.raises(ExperimentError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rank": 4}, r"unknown settings \['rank'\]. Known: accumulation"),
        ({"d": 5}, "either a budget or d"),
        ({"label_noise": 1.5}, r"label_noise must lie in \[0, 1\]"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"lr": None}, "needs lr"),
        ({"lr": "fast"}, "lr must be a finite number, got 'fast'"),
        ({"lr": math.nan}, "lr must be a finite number, got nan"),
        ({"lr": -1}, "lr must be positive"),
        ({"epochs": True}, "epochs must be a finite number, got True"),
        ({"epochs": "two"}, "epochs must be a finite number, got 'two'"),
        ({"train_size": "all"}, "train_size must be an integer or null, got 'all'"),
        ({"train_size": 32.5}, "train_size must be an integer or null, got 32.5"),
        ({"label_noise": "much"}, "label_noise must be a finite number"),
        ({"budget": "small"}, "budget must be an integer or null"),
        ({"r": "four"}, "r must be an integer, got 'four'"),
        ({"train_seed": -1}, r"train_seed must lie in \[0, 4294967295\]"),
        ({"timing": 1}, "timing must be true or false, got 1"),
        ({"plugins": "my.py"}, "plugins must be a list of values"),
        ({"hyperparameters": "a"}, "hyperparameters must be a mapping, got 'a'"),
        ({"hyperparameters": {"scale": [math.inf]}}, r"hyperparameters.scale\[0\] must be .* got inf"),
        ({"quantization": "int3"}, "quantization must be one of nf4, int8, got 'int3'"),
        ({"dtype": "float12"}, "dtype must be one of float32, bfloat16, float16, got 'float12'"),
        ({"base_dtype": "float12"}, "base_dtype must be one of"),
        ({"scheduler": "zigzag"}, "scheduler must be one of linear, cosine"),
        ({"scheduler": "warmup_stable_decay"}, "scheduler must be one of"),  # needs arguments that no setting gives
        ({"optimizer": "zigzag"}, "optimizer must be one of adamw_torch"),
        ({"device": "gpu"}, "device must be one of cpu, cuda, mps"),
        (
            {"target_modules": ["nope"]},
            r"target_modules \['nope'\], got: base: must have modules called",
        ),
        ({"target_modules": "("}, "target_modules"),
        ({"target_modules": ["query", "nope"]}, "target_modules must name layers of .* that PEFT adapts, got 'nope'"),
    ],
)
def test_impossible_settings_are_refused(task: str, model: str, extra: dict, message: str) -> None:
    from experiments.runs.resolve import resolve

    settings = {"task": task, "model": model, "projection": "unilora", "budget": 200, "seed": 0, "lr": 0.1}
    with pytest.raises(ExperimentError, match=message):
        resolve({**settings, **extra})


def test_a_missing_file_names_those_at_hand(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"sweeps/smoke.yaml"):
        read(tmp_path / "no.yaml")


@pytest.mark.parametrize("path", sorted(CONF.glob("sweeps/*.yaml")), ids=lambda p: p.stem)
def test_the_committed_sweeps_resolve(path: Path) -> None:
    sweep = read(path)
    for cell in sweep.cells():
        assert len({c.train_seed for c in sweep.confirmations(cell, {"lr": 0.01})}) == len(sweep.seeds)


def test_an_estimate_counts_what_is_missing(write, runs: Path) -> None:
    sweep = read(write("axes: {projection: [lora, unilora]}\ntune: {seeds: [0], lr: [0.1, 0.2]}\nseeds: [1, 2, 3]\n"))
    text = preflight.estimate(sweep, runs, at_once=1)
    assert "tune         4 runs, 0 done, 4 to train" in text and "confirm      6 runs, 0 done, 6 to train" in text
    assert "not known for 10 runs: --doctor" in text and not runs.exists()


@pytest.mark.parametrize(
    ("launcher", "options", "at_once", "hours"),
    [
        ("local", "", 4, 1.0),
        ("local", "local: {processes: 2}", 2, 2.0),
        ("local", "local: {processes: 8}", 1, 4.0),
        ("slurm", "", 8, 1.0),  # there are no more than four
        ("slurm", "local: {processes: 2}, slurm: {concurrency: 2, processes: 8}", 2, 2.0),
    ],
)
def test_an_estimate_follows_how_many_runs_the_launcher_trains_at_once(
    launcher: str, options: str, at_once: int, hours: float, write, runs: Path, monkeypatch, capsys
) -> None:
    """Four runs of six steps of ten minutes, an hour each, on four cores."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    path = write(f"axes: {{projection: [lora, unilora]}}\nseeds: [1, 2]\nlauncher: {{{options}}}\n")
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 0.01, epochs: 1"))
    cost = {"seconds_per_step": 600.0, "peak_bytes": 2e9}
    kinds = {preflight.kind(config) for config in preflight.runs_of(read(path))["confirm"]}
    write_json(runs / "sweeps" / "mine" / preflight.MEASURED, dict.fromkeys(kinds, cost))
    assert main([str(path), "--dry-run", "--launcher", launcher, "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert f"2.0 GB per run (measured), at most {at_once} at once" in out and f"{hours:.2f} h of training" in out


@pytest.mark.parametrize(
    ("dtypes", "lines"),
    [
        ("base_dtype: [float32]", {"float32": 4}),
        ("base_dtype: [bfloat16, float32]", {"bfloat16": 2, "float32": 4}),
        ("quantization: [null, int8]", {"float32": 4, "int8": 1}),
    ],
)
def test_an_estimate_weighs_each_base_as_it_is_loaded(write, runs: Path, dtypes: str, lines: dict, monkeypatch) -> None:
    large = BertConfig(vocab_size=30000, hidden_size=256, num_hidden_layers=2, num_attention_heads=4)
    with torch.device("meta"):
        base = AutoModelForSequenceClassification.from_config(large)
    monkeypatch.setattr(preflight, "unloaded", lambda *_: base)
    sweep = read(write(f"axes: {{projection: [lora], {dtypes}}}\n"))
    text = preflight.estimate(sweep, runs, at_once=1)
    count = sum(p.numel() for p in base.parameters())
    model = sweep.settings["model"]
    weights = [line for line in text.splitlines() if line.startswith("weights")]
    assert weights == [f"weights  {model} in {form}: {count * width / 1e9:.2f} GB" for form, width in lines.items()]


def test_relative_paths_are_those_of_what_lies_beside_the_file(
    tmp_path: Path, task: str, model: str, monkeypatch
) -> None:
    """Wherever the sweep is started; what lies in the working directory alone is found too, as on a command line."""
    study, elsewhere = tmp_path / "study", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(task, study / "my_reviews")
    own = (ROOT / "examples" / "cyclic.py").read_text()
    (study / "mine.py").write_text(own.replace('"cyclic"', '"beside_the_file"'))
    (elsewhere / "here.py").write_text(own.replace('"cyclic"', '"in_the_directory"'))
    (study / "mine.yaml").write_text(
        f"settings: {{model: {model}, task: my_reviews, lr: 0.01, d: 64, plugins: [mine.py]}}\n"
        "axes: {projection: [beside_the_file]}\n"
    )
    found = {}
    for cwd, file in ((study, "mine.yaml"), (elsewhere, "../study/mine.yaml")):
        monkeypatch.chdir(cwd)
        (found[cwd],) = preflight.runs_of(read(Path(file)))["confirm"]
        assert found[cwd].plugins == [str(study / "mine.py")]
    assert found[study].task == "my_reviews" and found[elsewhere].task == str(study / "my_reviews")
    override = ["settings.plugins=[here.py]", "axes.projection=[in_the_directory]"]
    (run,) = preflight.runs_of(read(Path("../study/mine.yaml"), override))["confirm"]
    assert run.plugins == [str(elsewhere / "here.py")]
    (elsewhere / "mine.py").write_text("raise AssertionError")
    with pytest.raises(ExperimentError, match=r"plugins mine.py must lie in one place, got .*study/mine.py and "):
        read(Path("../study/mine.yaml"))


def test_names_are_no_paths(tmp_path: Path, model: str, monkeypatch) -> None:
    for name in ("vader", "hub", "statistics"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.yaml").write_text(
        f"settings: {{model: {model}, task: vader, data: hub, lr: 0.01, d: 64, plugins: [statistics]}}\n"
        "axes: {projection: [unilora]}\n"
    )
    monkeypatch.chdir("/")
    (run,) = preflight.runs_of(read(tmp_path / "mine.yaml"))["confirm"]
    assert (run.task, run.data, list(run.plugins)) == ("vader", "hub", ["statistics"])


LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"mine.yaml must spell its values out, .* got the alias \*a0 in line 3. Write the values themselves"),
        ("axes: &all {lr: [0.1]}\ntune: {<<: *all}\n", r"got the alias \*all in line 3"),
        ("axes: " + "[" * 30 + "]" * 30, "at most 20 lists and mappings deep, got more in line 2"),
        ("axes: " + "[" * 40_000, "at most 20 lists and mappings deep, got more in line 2"),
        (f"# {'x' * 100_000}\n", "mine.yaml must have at most 100,000 bytes, got 100,"),
        (f"axes: { {key: list(range(1, 209)) for key in ('budget', 'alpha', 'train_size')} }",
         r"must ask for at most 10,000 runs, got 8,998,912. Shorten an axis, or raise most_runs"),
        ("seeds: [1, 2, 3]\nmost_runs: 2", "must ask for at most 2 runs, got 3"),
        ("seeds: [1, 2]\ntune: {seeds: [3, 4, 5], lr: [0.1, 0.2]}\nmost_runs: 7", "at most 7 runs, got 8. Shorten"),
        ("most_runs: many", "most_runs must be an integer, got 'many'"),
    ],
    ids=["laughs", "merged", "deep", "deeper", "long", "crossed", "seeds", "tuned", "no number"],
)  # fmt: skip
def test_what_would_take_the_memory_of_a_machine_is_refused_by_its_size(write, text: str, message: str) -> None:
    # of the processor, which other work does not lengthen
    started = time.process_time()
    with pytest.raises(ExperimentError, match=message) as error:
        read(write(text))
    assert time.process_time() - started < 10 and len(str(error.value)) < 500


def test_more_runs_are_taken_where_the_file_says_so(write) -> None:
    alphas, seeds = list(range(1, 102)), list(range(100))
    asked = f"axes: {{alpha: {alphas}}}\nseeds: {seeds}\n"
    with pytest.raises(ExperimentError, match="at most 10,000 runs, got 10,100"):
        read(write(asked))
    assert read(write(f"{asked}most_runs: 10100\n")).size == 10_100
    assert read(write("axes: {projection: [lora, unilora]}"), ["axes.projection=[lora]"]).size == 1


@pytest.mark.parametrize("defaults", ["[base, _self_]", "[{/settings: base}, _self_]", "[{optional settings: [base]}]"])
def test_a_file_that_a_sweep_is_made_of_is_bounded_too(write, tmp_path: Path, defaults: str) -> None:
    path = write(f"defaults: {defaults}\n")
    (tmp_path / "settings").mkdir()
    for base in (tmp_path / "base.yaml", tmp_path / "settings" / "base.yaml"):
        base.write_text(LAUGHS)
    with pytest.raises(ExperimentError, match=r"base.yaml must spell its values out, .* got the alias \*a0 in line 2"):
        read(path)

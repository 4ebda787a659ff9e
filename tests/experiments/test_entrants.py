"""What stands in a comparison beside projections: PEFT's methods by their names, full fine-tuning, the head alone.

The tiny BERT has four modules of 32 x 32 that are adapted, and a head of 2 * 32 + 2 numbers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, BertModel, ViTConfig

from experiments import compare, harness, names, sweep, train
from experiments.errors import ExperimentError
from experiments.models import load_tokenizer
from experiments.models.text import TextClassifier
from experiments.processes import Processes
from experiments.records.reading import load
from experiments.runs import entrants
from experiments.runs.callbacks import checkpoints
from experiments.runs.config import RunConfig
from experiments.runs.entrants.solve import nearest
from experiments.runs.folder import prepare
from experiments.runs.resolve import resolve
from experiments.runs.run import Run
from experiments.runs.training import INTERRUPTED, last_checkpoint
from experiments.sweeps import preflight, workers
from experiments.sweeps.file import read
from paper_figures import style
from paper_figures.report.__main__ import main as report_main
from tests.experiments.processes import train_until
from uniproj.errors import OneLineError, ProjectionError

HEAD = 2 * 32 + 2


@pytest.fixture
def settings(task: str, model: str) -> dict[str, Any]:
    return {"task": task, "model": model, "seed": 0, "lr": 0.05, "r": 2}


def _loaded(model: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(model, trust_remote_code=False)


# by their definitions, on four modules of 32 x 32
COUNTS = {
    "peft/lora": ({}, 4 * 2 * 64),
    "peft/dora": ({}, 4 * (2 * 64 + 32)),
    "peft/loha": ({}, 4 * 4 * 2 * 32),
    "peft/vera": ({}, 4 * (32 + 2)),
    "peft/shira": ({}, 4 * 2 * 64),
    "peft/fourierft": ({"n_frequency": 50}, 4 * 50),
    "peft/waveft": ({"n_frequency": 50}, 4 * 50),
    "peft/c3a": ({"block_size": 8}, 4 * 32 * 32 // 8),
    "peft/ia3": ({"target_modules": ["key", "value"], "feedforward_modules": []}, 4 * 32),
    "peft/prompt_tuning": ({"num_virtual_tokens": 5}, 5 * 32),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_count_is_that_of_the_definition_and_of_peft(name: str, settings: dict, model: str) -> None:
    options, count = COUNTS[name]
    config = resolve({**settings, "projection": {name: options}})
    entrant = entrants.get(config.projection)
    entrant.check(config)
    assert entrant.count(config) == count
    attached = entrant.attach(_loaded(model), config, TextClassifier)
    assert attached.get_nb_trainable_parameters()[0] == count + HEAD


def test_full_fine_tuning_trains_everything_and_the_head_nothing_else(settings: dict, model: str) -> None:
    total = sum(p.numel() for p in _loaded(model).parameters())
    full, head = (resolve({**settings, "projection": name, "budget": 200}) for name in ("full", "head"))
    assert (full.budget, full.d, head.budget) == (None, None, None)
    for config, own in ((full, total - HEAD), (head, 0)):
        entrant = entrants.get(config.projection)
        attached = entrant.attach(_loaded(model), config, TextClassifier)
        counts = [sum(p.numel() for p in part.values()) for part in entrants.parts(attached, TextClassifier.heads)]
        assert counts == [own, HEAD] and entrant.count(config) == own


@pytest.mark.parametrize(
    ("asked", "budget", "found"),
    [
        ("peft/fourierft", 209, {"n_frequency": 52}),
        ("peft/lora", 600, {"r": 2}),
        ("peft/gralora", 1300, {"r": 6}),  # whose rank must be even
        ("peft/c3a", 600, {"block_size": 8}),  # 4,096 / 8 numbers
        ("peft/lora", 1, {"r": 1}),
        ("peft/lora", 100, {"r": 1}),
        ({"peft/loha": {"budget_option": "r"}}, 1000, {"r": 2}),
        ({"peft/c3a": {"budget_option": {"block_size": "falling divisors"}}}, 600, {"block_size": 8}),
    ],
)
def test_a_budget_is_solved_over_the_option_that_scales_the_count(
    asked: Any, budget: int, found: dict, settings: dict
) -> None:
    config = resolve({**settings, "projection": asked, "budget": budget})
    assert config.budget == budget and {**config.hyperparameters, "r": config.r}.items() >= found.items()


def test_an_option_that_is_given_stands_and_a_method_without_one_says_what_it_trains(file: Path, capsys) -> None:
    assert resolve({**_of(file), "projection": {"peft/fourierft": {"n_frequency": 7}}, "budget": 200}).budget is None
    named = "axes.projection=[unilora,peft/dora,{peft/road: {group_size: 8}},lora,full,head]"
    remarks = preflight.remarks(read(file, [named]))
    # rank 1 of LoRA and a magnitude for each output; an angle and a scale for every two outputs
    assert [remark.split(" numbers")[0].split(" trains ")[1] for remark in remarks] == ["384", "128"]
    assert "+92.0% beside the budget of 200" in remarks[0]
    assert sweep.main([str(file), "axes.projection=[peft/dora]", "--dry-run"]) == 0
    assert "budget   peft/dora on" in capsys.readouterr().out


def _of(file: Path) -> dict[str, Any]:
    return {**read(file).settings, "seed": 0, "lr": 0.05}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("peft/fourier", "unknown entrant 'peft/fourier'. Did you mean 'peft/fourierft'"),
        ("dora", "Did you mean 'lora' or 'tied_lora' or 'peft/dora'"),
        ("ful", "Did you mean 'full'"),
        (
            {"peft/fourierft": {"frequency": 3}},
            "unknown option of peft/fourierft 'frequency'. Did you mean 'n_frequency'",
        ),
        ({"full": {"keeep": True}}, "unknown option of full 'keeep'. Did you mean 'keep'"),
        ({"head": {"r": 1}}, "unknown option of head 'r'. Known: none"),
        ({"peft/lora": {"budget_option": "rank"}}, "unknown option of peft/lora 'rank'"),
        (
            {"peft/lora": {"budget_option": {"r": "primes"}}},
            "or one option with the kind of its values",
        ),
        ({"peft/lora": {"budget_option": {"r": ["integers"]}}}, "or one option with the kind of its values"),
        ({"peft/lora": {"r": "4"}}, "peft/lora: r must be an integer, got '4'"),
        ({"peft/dora": {"use_dora": False}}, "unknown option of peft/dora 'use_dora'"),
        ({"full": {"keep": "yes"}}, "keep of full must be true or false, got 'yes'"),
        ({"peft/lora": {}, "full": {}}, "must be written as one name with a mapping"),
        ({"peft/lora": 3}, "must be written as one name with a mapping"),
    ],
)
def test_what_is_spelled_wrongly_is_said_with_the_nearest_names(asked: Any, message: str, file: Path, capsys) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "axes": {"projection": ["lora", asked]}}))
    assert sweep.main([str(file), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "others", "message"),
    [
        ("peft/poly", {}, "peft/poly needs `task_ids` of every row, which runs do not have. Choose another"),
        ("peft/lora", {"d": 64, "budget": None}, "d must be left to projections, got d=64 for peft/lora. Write it as"),
        ("peft/fourierft", {"dropout": 0.1}, "peft/fourierft has no dropout of its input, got 0.1. Set dropout: 0"),
        ("peft/fourierft", {"quantization": "nf4"}, "cannot adapt weights packed as nf4. Leave quantization out"),
        ("full", {"quantization": "int8"}, "full must train weights of floats, got a base quantised as int8"),
        ({"peft/c3a": {"block_size": 7}}, {}, "peft/c3a must be attached to"),
        ({"peft/lora": {"target_modules": ["nope"]}}, {"budget": None}, "got: No modules were targeted for adaptation"),
        ({"peft/prefix_tuning": {"num_virtual_tokens": 4}}, {"gradient_checkpointing": True}, "gradient checkpointing"),
        (
            {"peft/prefix_tuning": {"prefix_projection": True, "encoder_hidden_size": 8}},
            {},
            "PEFT saves the tokens alone",
        ),
        ("peft/p_tuning", {}, "needs checkpoints of the network that makes its tokens, where PEFT saves the tokens"),
        # its scale alone
        ({"peft/lora": {"budget_option": "lora_alpha"}}, {}, "must be solved over an option that changes how many"),
        ({"peft/lora": {"budget_option": "use_rslora"}}, {"budget": 9}, "use_rslora, at whose values it trains 1,024."),
        # plain LoRA, were it not prepared for
        ({"peft/lora": {"init_lora_weights": "eva"}}, {}, "needs more than a run does for init_lora_weights: eva"),
        # blocks of one number each, which cannot turn
        ("peft/oft", {"budget": 1}, "peft/oft must train numbers of its own on"),
    ],
)
def test_what_an_entrant_cannot_do_is_said_before_the_run(
    asked: Any, others: dict, message: str, file: Path, runs: Path, capsys
) -> None:
    content = json.loads(file.read_text())
    content["settings"] = {key: value for key, value in {**content["settings"], **others}.items() if value is not None}
    file.write_text(json.dumps({**content, "axes": {"projection": [asked]}}))
    assert sweep.main([str(file), "--dry-run", "--runs", str(runs)]) == 2
    said = capsys.readouterr().err
    assert message in said, said
    assert not runs.exists()


def test_a_language_model_has_no_head_and_only_a_frozen_base_is_sharded(
    settings: dict, tmp_path: Path, file: Path
) -> None:
    rows = pd.DataFrame({"prompt": ["one", "two"], "completion": ["1", "2"], "answer": ["1", "2"]})
    for split in ("train", "validation", "test"):
        rows.to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
    config = resolve({**settings, "task": str(tmp_path), "projection": "head"})
    with pytest.raises(ExperimentError, match=r"head must train the fresh head of a classifier, got .* Choose `full`"):
        entrants.get("head").check(config)
    sharded = "+launcher={local: {processes: 2, sharded: true}}"
    for name in ("full", "head", "peft/lora"):
        with pytest.raises(ExperimentError, match=f"{name} must have its whole base on each process"):
            preflight.check(read(file, [f"axes.projection=[unilora,{name}]", sharded]))


def test_a_method_that_gives_no_loss_on_pictures_is_refused(settings: dict, tmp_path: Path) -> None:
    """PEFT's shadow network is told of token ids and embeddings, which a vision transformer does not take."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ViTConfig(**sizes, image_size=16, patch_size=8).save_pretrained(tmp_path)
    pictures = {**settings, "task": "cifar10", "model": str(tmp_path), "target_modules": "all-linear"}
    for name in ("peft/lora", "peft/vera", "peft/shira"):
        entrants.get(name).check(resolve({**pictures, "projection": name}))
    with pytest.raises(ExperimentError, match=r"peft/shadow must give a loss on .* or choose another entrant"):
        entrants.get("peft/shadow").check(resolve({**pictures, "projection": "peft/shadow"}))


def test_every_method_of_peft_joins_or_says_why_not(settings: dict) -> None:
    """At its own size, or with the option that it has no default of."""
    needed = {"fourierft": {"n_frequency": 9}, "c3a": {"block_size": 8}, "vblora": {"vector_length": 16}}
    refused = {}
    for name in entrants.others():
        try:
            config = resolve({**settings, "projection": {name: needed.get(name.removeprefix("peft/"), {})}})
            entrants.get(name).check(config)
            count = entrants.get(name).count(config)
            assert count > 0 or name == "head", name
        except OneLineError as error:
            refused[name] = str(error)
    assert len(refused) < len(entrants.others()) / 2, refused
    print(refused)


def test_two_lines_compare_a_projection_with_peft_and_full_fine_tuning(
    model: str, tmp_path: Path, runs: Path, here, capsys
) -> None:
    task, path = tmp_path / "reviews", tmp_path / "mine.yaml"
    task.mkdir()
    rows = pd.DataFrame({"text": ["a good film", "a bad film"] * 16, "label": [1, 0] * 16})
    for split in ("train", "validation", "test"):
        rows.to_json(task / f"{split}.jsonl", orient="records", lines=True)
    path.write_text(
        f"settings: {{task: {task}, model: {model}, budget: 200, lr: 0.02, epochs: 4}}\n"
        "axes: {projection: [unilora, peft/fourierft: {scaling: 100}, full, head]}\n"
    )
    assert sweep.main([str(path), "--runs", str(runs)]) == 0
    tables = capsys.readouterr().out
    for name in ("unilora", "peft/fourierft", "full", "head"):
        assert f" {name} " in tables
    rows = load(runs).set_index("projection")
    total = sum(p.numel() for p in _loaded(model).parameters())
    assert rows["trained"].to_dict() == {"unilora": 200, "peft/fourierft": 200, "full": total - HEAD, "head": 0}
    # few steps on random weights: what did not learn is told like a projection
    assert rows["head"].eq(HEAD).all() and pd.isna(rows.loc["full", "did_not_train"])
    assert all(
        f"did not train, so in no mean: {name} on" in tables for name in rows.index[rows["did_not_train"].notna()]
    )
    assert rows["budget_error"].dropna().to_dict() == {"unilora": 0.0, "peft/fourierft": 0.0}
    assert (rows["theta_change"] > 0).all() and rows["cost"].map(lambda cost: cost["peak_bytes"] > 0).all()
    # coordinates of its spectrum, two numbers of 8 bytes each
    assert rows.loc["peft/fourierft", "index_bytes"] == 200 * 16 and rows.loc["full", "resident_bytes"] == 0
    assert rows.loc["full", "adapter_bytes"] == 4 * (total - HEAD)

    fourier, full = (Path(rows.loc[name, "folder"]) for name in ("peft/fourierft", "full"))
    assert fourier.name.startswith("peft-fourierft-") and not (full / "adapter").exists() and not checkpoints(full)
    loaded = PeftModel.from_pretrained(_loaded(model), fourier / "adapter").eval()
    run = Run.load(fourier)
    run.entrant.load(run.model, fourier / "adapter")
    batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
    assert torch.equal(loaded(**batch).logits, run.model.eval()(**batch).logits)

    assert harness.main([str(full)]) == 2
    assert "are kept where the sweep says {full: {keep: true}}" in capsys.readouterr().err

    page = tmp_path / "report.html"
    assert report_main([str(runs), "--out", str(page)]) == 0
    assert all(label in page.read_text() for label in ("FourierFT", "full fine-tuning", "head alone"))


def test_every_entrant_is_tuned_by_as_many_trials(file: Path) -> None:
    asked = read(file, ["axes.projection=[lora,unilora,peft/fourierft,full,head]"])
    trials = [asked.trials(cell) for cell in asked.cells()]
    assert [[trial.lr for trial in each] for each in trials] == [[0.01, 0.05]] * 5
    assert {trial.train_seed for each in trials for trial in each} == {0}


def test_options_make_another_kind_of_run(file: Path, runs: Path, monkeypatch, capsys) -> None:
    """One of two kinds may fail, and trains at another speed."""

    def examine(config: RunConfig) -> dict[str, float]:
        if config.hyperparameters.get("block_size") == 4 or config.gradient_checkpointing:
            raise RuntimeError("not so")
        return {"seconds_per_step": 1.0, "peak_bytes": 1.0}

    monkeypatch.setattr(preflight, "_examine", examine)
    axes = ["axes.projection=[{peft/c3a: {block_size: 4}}, {peft/c3a: {block_size: 8}}]"]
    for more, said in (([], "1 of 2 kinds"), (["+axes.gradient_checkpointing=[false, true]"], "1 of 4 kinds")):
        assert sweep.main([str(file), *axes, *more, "--doctor", "--runs", str(runs)]) == 1
        assert said in capsys.readouterr().out


@pytest.mark.system
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_doctor_takes_a_step_saves_and_loads_each_kind(dtype: str, file: Path, runs: Path, capsys) -> None:
    kinds = "axes.projection=[unilora,peft/fourierft,{full: {keep: true}},head]"
    dtypes = f"+settings.dtype={dtype}", f"+settings.base_dtype={dtype}"
    assert sweep.main([str(file), kinds, *dtypes, "--doctor", "--runs", str(runs)]) == 0
    assert "4 of 4 kinds of run work." in capsys.readouterr().out


@pytest.mark.system
@pytest.mark.parametrize("asked", [{"full": {"keep": True}}, "peft/randlora", "peft/pvera", "head"])
def test_an_interrupted_run_resumes_to_the_same_numbers(asked: Any, settings: dict, tmp_path: Path) -> None:
    config = resolve({**settings, "lr": 1e-3, "projection": asked, "evaluations": 2, "score_on": "validation"})
    cut, whole = (prepare(tmp_path / name, config.to_json()) for name in ("cut", "whole"))
    assert train_until(7, str(cut)) == INTERRUPTED and last_checkpoint(cut) == str(cut / "checkpoint-7")
    file = next((cut / "checkpoint-7").glob("*.safetensors"))
    kept = file.read_bytes()
    file.write_bytes(kept[:-40])
    assert last_checkpoint(cut) == str(cut / "checkpoint-6")
    file.write_bytes(kept)
    assert train.main([str(cut)]) == train.main([str(whole)]) == 0
    ours, theirs = (load_file(next((folder / "adapter").glob("*.safetensors"))) for folder in (cut, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


PLUGIN = """
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel


class MineConfig(LoraConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "MINE"


PEFT_TYPE_TO_CONFIG_MAPPING["MINE"] = MineConfig
PEFT_TYPE_TO_TUNER_MAPPING["MINE"] = type("MineModel", (LoraModel,), {})
PEFT_TYPE_TO_PREFIX_MAPPING["MINE"] = "lora_"
"""


def test_a_tuner_of_another_package_joins_by_the_name_that_it_registers(
    file: Path, tmp_path: Path, runs: Path, here, monkeypatch, capsys
) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    monkeypatch.setattr("experiments.sweeps.protocol.MOST_BEYOND", 0)
    (tmp_path / "theirs.py").write_text(PLUGIN)
    asked = [str(file), "axes.projection=[peft/mine]", "~tune", "+settings.lr=0.05", "seeds=[1]"]
    with pytest.raises(ProjectionError, match="unknown entrant 'peft/mine'"):
        entrants.get("peft/mine")
    try:
        assert sweep.main([*asked, f"+settings.plugins=[{tmp_path / 'theirs.py'}]", "--runs", str(runs)]) == 0
        (row,) = load(runs).to_dict("records")
        # a budget of 200 is nearest to rank 1
        assert (row["projection"], row["r"], row["trained"]) == ("peft/mine", 1, 256)
        assert "peft/mine on" in capsys.readouterr().out  # beyond the budget
    finally:
        CONFIGS.pop("MINE", None)


def test_the_command_takes_options_behind_a_colon(model: str, task: str, runs: Path, capsys) -> None:
    asked = ["--projections", "lora", "peft/fourierft: {n_frequency: 30}", "full", "--lr", "0.01", "--budget", "200"]
    assert compare.main(["--model", model, "--task", task, *asked, "--runs", str(runs), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"peft/fourierft 0.01 +4 +120 +n_frequency=30\n +full 0.01 +4 +1009280", shown)
    assert compare.main(["--projections", "peft/fourierft: {n", "--lr", "0.01", "--runs", str(runs)]) == 2
    assert "must be written as `name` or `name: {option: value}`" in capsys.readouterr().err


def test_records_and_looks_know_entrants_by_name(runs: Path) -> None:
    known = [name for name in entrants.others() if name in names.mapping("methods")]
    assert {"full", "head", "peft/dora", "peft/fourierft", "peft/randlora"} <= set(known)
    looks = {(style.colour(name), style.marker(name)) for name in entrants.names()}
    assert len(looks) == len(entrants.names())


@pytest.mark.parametrize("count", [lambda n: 12 * n + 5, lambda n: n**3, lambda n: 10 * n if n < 400 else float("inf")])
def test_the_nearest_count_is_found_in_few_questions(count: Any) -> None:
    values, asked = range(1, 5000), []

    def told(value: int) -> float:
        asked.append(value)
        return count(value)

    for budget in (1, 100, 4740, 3991):
        asked.clear()
        best = min(values, key=lambda value: abs(count(value) - budget))
        assert nearest(told, values, budget) == best and len(asked) == len(set(asked)) < 30
    assert nearest(lambda n: n, [7], 100) == 7
    assert nearest(lambda n: min(n, 12), values, 4000) == 12


@pytest.mark.system
@pytest.mark.parametrize("asked", [{"full": {"keep": True}}, {"peft/fourierft": {"scaling": 100}}])
def test_two_processes_train_as_one(asked: Any, settings: dict, tmp_path: Path) -> None:
    small = AutoConfig.from_pretrained(settings["model"], trust_remote_code=False)
    small.hidden_dropout_prob = small.attention_probs_dropout_prob = 0.0
    BertModel(small).save_pretrained(tmp_path / "bert")
    load_tokenizer("minilm").save_pretrained(tmp_path / "bert")
    own = {"model": str(tmp_path / "bert"), "lr": 1e-3, "batch_size": 8, "train_size": 32, "score_on": "validation"}
    config = resolve({**settings, **own, "projection": asked}).to_json()
    alone, together = (prepare(tmp_path / name, config) for name in ("alone", "together"))
    assert train.main([str(alone)]) == 0
    assert workers.start(together, Processes(2)).wait() == 0, workers.last_words(together)
    ours, theirs = (load_file(next((folder / "adapter").glob("*.safetensors"))) for folder in (together, alone))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=5e-5)

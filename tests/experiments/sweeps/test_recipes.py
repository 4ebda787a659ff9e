"""The paper's recipes and the tasks they use, on small models and a few rows of the real data: all but their size."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, ViTConfig, ViTImageProcessor, ViTModel

from experiments import method_comparison, mt_bench, sweep, tasks
from experiments.models import adapted_layout, unloaded
from experiments.records import gather
from experiments.records.reading import load
from experiments.runs import Run, RunConfig
from experiments.sweeps.file import CONF, read
from experiments.tasks.commonsense import TESTS
from uniproj.projection import Projection
from uniproj.registry import build

FEW = 12


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny-vit")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **size)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory, shared_data: str) -> str:
    """The published files cut to their first rows; MetaMathQA and CodeFeedback filled from GSM8K, HumanEval made up."""
    folder, shared = tmp_path_factory.mktemp("data"), Path(shared_data)
    for path in [*shared.glob("*/*/*.jsonl"), *shared.glob("*/*.jsonl")]:
        _write(pd.read_json(path, lines=True, nrows=10 * FEW), folder / path.relative_to(shared))
    for path in shared.glob("commonsense/*/*.parquet"):
        _write(pd.read_parquet(path).head(10 * FEW), (folder / path.relative_to(shared)).with_suffix(".jsonl"))
    # EuroSAT has ten classes too, and a validation split of its own
    for name, splits in (("cifar10", ("train", "test")), ("eurosat", ("train", "validation", "test"))):
        (folder / name).mkdir()
        for split in splits:
            rows = pd.read_parquet(shared / "cifar10_small" / f"{split}.parquet").head(10 * FEW)
            rows.to_parquet(folder / name / f"{split}.parquet")
    shown = pd.read_json(folder / "gsm8k" / "train.jsonl", lines=True)
    _write(shown.rename(columns={"question": "query", "answer": "response"}), folder / "metamathqa" / "train.jsonl")
    _write(shown.rename(columns={"question": "query"}), folder / "codefeedback" / "train.jsonl")
    problem = {"prompt": "def one():\n", "canonical_solution": "    return 1\n", "test": "", "entry_point": "one"}
    _write(pd.DataFrame([problem] * FEW), folder / "humaneval" / "test.jsonl")
    return str(folder)


def _write(rows: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_json(path, orient="records", lines=True)


SMALL = [
    "settings.device=cpu", "seeds=[1]", "++settings.d=64", "++settings.epochs=1", "++settings.evaluations=1",
    "++settings.train_size=12", "++settings.validation_size=6", "++settings.test_size=6", "++settings.batch_size=2",
]  # fmt: skip


def _run(recipe: str, runs: Path, data: str, *overrides: str) -> pd.DataFrame:
    path = CONF / "sweeps" / "paper" / f"{recipe}.yaml"
    assert sweep.main([str(path), *SMALL, f"settings.data={data}", *overrides, "--runs", str(runs)]) == 0
    found = load(runs)
    of_own_size = found["projection"].isin(["lora", "full"])
    assert (found["theta_change"] > 0).all() and (found.loc[~of_own_size, "trained"] == 64).all()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["glue_base", "glue_large"])
def test_glue(recipe: str, runs: Path, few_rows: str, model: str, here) -> None:
    cases = "cases=[{task:glue/rte,head_lr:5e-3,lr:5e-3},{task:glue/stsb,head_lr:2e-4,lr:5e-3}]"
    found = _run(recipe, runs, few_rows, f"settings.model={model}", "settings.max_length=32", cases)
    assert set(found["metric"]) == {"accuracy", "Pearson"} and set(found["rows"]) == {6}
    assert all(found["incomplete_data"].map(lambda d: d["test"]["rows"]) == 120)


@pytest.mark.system
def test_math(runs: Path, few_rows: str, llama: str, here) -> None:
    # fp16 arithmetic and 64 accumulated rows need a GPU and 64 rows
    small = ["settings.dtype=float32", "settings.accumulation=2", "settings.max_length=96", "settings.max_new_tokens=4"]
    found = _run("math", runs, few_rows, *small, f"axes.model=[{llama}]", "settings.test_size=24")
    assert set(found["groups"].iloc[0]) == {"gsm8k", "math500"} and found["rows"].iloc[0] == 24
    texts = pd.read_csv(Path(found["folder"].iloc[0]) / "predictions-last.csv")
    assert set(texts.columns) == {"group", "label", "prediction", "text"}


@pytest.mark.slow
def test_instruction(runs: Path, few_rows: str, llama: str, here) -> None:
    # the 4-bit base is quantised on the CPU too; a paged optimiser is not
    small = ["settings.optimizer=adamw_torch", "settings.max_length=96", "settings.max_new_tokens=4"]
    found = _run("instruction", runs, few_rows, *small, f"cases=[{{model:{llama}}}]")
    assert set(found["quantization"]) == {"nf4"} and set(found["rows"]) == {6}
    assert 0.0 <= found["score"].iloc[0] <= 1.0
    folder = Path(found["folder"].iloc[0])
    assert mt_bench.main([str(folder), "--questions", "3"]) == 0
    answers = [json.loads(line) for line in (folder / mt_bench.ANSWERS).read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [81, 82, 83]
    assert all(len(answer["choices"][0]["turns"]) == 2 for answer in answers)


def test_vision(runs: Path, few_rows: str, vit: str, here) -> None:
    cases = ",".join(f"{{model:{vit},task:{task},lr:1e-2,head_lr:5e-2}}" for task in ("cifar10", "eurosat"))
    found = _run("vision", runs, few_rows, "settings.dtype=float32", f"cases=[{cases}]")
    assert set(found["task"]) == {"cifar10", "eurosat"}
    assert set(found["head"]) == {32 * 10 + 10} and set(found["rows"]) == {6}


def test_a_folder_of_pictures(runs: Path, tmp_path: Path, few_rows: str, vit: str, here) -> None:
    rows = pd.read_parquet(Path(few_rows) / "cifar10" / "train.parquet")
    for i, (image, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
        place = tmp_path / "pictures" / ("train" if i % 4 else "test") / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.jpg").write_bytes(image["bytes"])
    found = _run(
        "vision", runs, "hub", "settings.dtype=float32", f"cases=[{{model:{vit},task:{tmp_path / 'pictures'},lr:1e-2}}]"
    )
    assert found["head"].iloc[0] == 32 * 10 + 10


def _of_2026(recipe: str, runs: Path, data: str, llama: str, *overrides: str) -> pd.DataFrame:
    """A recipe of the 8B bases on a small one, at a given rate in place of tuning."""
    small = ["settings.dtype=float32", "settings.base_dtype=float32", "settings.accumulation=2"]
    small += ["settings.max_length=96", "settings.max_new_tokens=4", f"axes.model=[{llama}]"]
    given = ["axes.projection=[unilora]", "~tune", "++settings.lr=1e-2"]
    return _run(recipe, runs, data, *small, *(overrides or given))


@pytest.mark.parametrize("recipe", ["math_8b", "commonsense_8b", "code_8b", "ifeval_8b"])
def test_recipes_of_2026_tune_lora_by_as_many_trials(recipe: str) -> None:
    asked = read(CONF / "sweeps" / "paper" / f"{recipe}.yaml")
    cells = asked.cells()
    assert {cell["projection"] for cell in cells} == {"lora", "unilora"} and len(cells) == 4
    assert [(len(asked.trials(cell)), len(asked.confirmations(cell, {"lr": 1e-3}))) for cell in cells] == [(5, 3)] * 4


@pytest.mark.system
def test_math_8b_is_tuned_and_confirmed(runs: Path, few_rows: str, llama: str, here) -> None:
    found = _of_2026("math_8b", runs, few_rows, llama, "tune.lr=[1e-2]")
    tested = found[found["score_on"] == "test"]
    assert sorted(tested["projection"]) == ["lora", "unilora"] and len(found) == 2 * (1 + 1)
    assert set(tested["rows"]) == {6} and set(tested["groups"].iloc[0]) <= {"gsm8k", "math500"}


@pytest.mark.system
def test_code_8b(runs: Path, few_rows: str, llama: str, here, monkeypatch, capsys) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(AssertionError):
        _of_2026("code_8b", runs, few_rows, llama)
    assert "HF_ALLOW_CODE_EVAL must be 1" in capsys.readouterr().err and not list(runs.rglob("result.json"))
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    # what a random model writes is not run here
    metric = SimpleNamespace(pass_at_k=lambda references, predictions, k: {"pass@1": float("one" in references[0])})
    monkeypatch.setattr("experiments.tasks.humaneval._harness", lambda: metric)
    found = _of_2026("code_8b", runs, few_rows, llama).iloc[0]
    assert (found["score"], found["rows"]) == (1.0, 6)


@pytest.mark.slow
def test_ifeval_8b(runs: Path, few_rows: str, llama: str, here) -> None:
    found = _of_2026("ifeval_8b", runs, few_rows, llama).iloc[0]
    assert found["task"] == "alpaca" and found["rows"] == 6 and 0.0 <= found["score"] <= 1.0


# PEFT's reader (method_comparison/processing.py) makes these integers and floats
INTEGERS = {
    "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "file_size",
    "num_trainable_params",
}  # fmt: skip
PACKAGES = ("peft", "transformers", "datasets", "torch", "bitsandbytes")


def test_pefts_benchmark_writes_and_reads_its_files(runs: Path, few_rows: str, llama: str, here, monkeypatch) -> None:
    # a few steps on random weights gain little
    monkeypatch.setattr("experiments.runs.result.LEAST_GAIN", 0.0)
    cases = (
        "cases=[{projection:lora,r:2,alpha:4,lr:1e-2,weight_decay:0.1},{projection:unilora,r:2,lr:1e-1},"
        "{projection:full,lr:1e-3}]"
    )
    small = ["settings.base_dtype=float32", "settings.max_length=96", "settings.max_new_tokens=4"]
    found = _run("peft_benchmark", runs, few_rows, *small, f"settings.model={llama}", cases)
    differences = pd.read_csv(runs / "sweeps" / "peft_benchmark" / "paired.csv")
    assert list(differences["pairs"]) == [1, 1]  # alpha and weight decay are a method's own
    out, folders = runs / "peft", list(found["folder"])
    assert method_comparison.main(["write", *folders, "--out", str(out)]) == 0
    files = [json.loads(path.read_text()) for path in sorted(out.glob("uniproj--*.json"))]
    rows = Run.load(Path(folders[0])).trainer.train_dataset["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(llama, trust_remote_code=False).num_parameters()
    for content, (projection, row) in zip(files, found.set_index("projection").sort_index().iterrows(), strict=True):
        info, train = content["run_info"], content["train_info"]
        last = train["metrics"][-1]
        assert all(isinstance(train[key], int) for key in INTEGERS) and train["status"] == "success"
        assert float(info["total_time"]) >= float(train["train_time"]) > 0
        assert (info["peft_config"] or {"projection": "full"})["projection"] == projection
        assert "Question: {query} Think step by step.\nAnswer:" in info["train_config"]["query_template"]
        assert pd.Timestamp(info["created_at"]) <= pd.Timestamp(row["provenance"]["finished"])
        assert (last["test accuracy"], last["train samples"]) == (row["score"], 12)
        assert last["train total tokens"] == sum(len(ids) for ids in rows)
        assert train["num_trainable_params"] == row["trained"]
        assert train["num_total_params"] == whole + (projection != "full") * row["trained"]
        assert info["train_config"]["optimizer_kwargs"] == {"lr": row["lr"], "weight_decay": row["weight_decay"]}
        assert {f"{name}-version" for name in PACKAGES} <= set(content["meta_info"]["package_info"])
    assert method_comparison.main(["read", str(out), "--out", str(runs / "again")]) == 0
    again = gather.read(runs / "again").runs.set_index("projection")
    for projection, row in found.set_index("projection").iterrows():
        assert again.loc[projection, "trained"] == row["trained"] and again.loc[projection, "score"] == row["score"]


def test_pefts_benchmark_trains_as_many_numbers_as_peft_says(tmp_path: Path) -> None:
    """num_trainable_params and num_total_params of its result files, on the shapes of Llama-3.2-3B."""
    size = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    size |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True}
    LlamaConfig(**size).save_pretrained(tmp_path)
    asked = read(CONF / "sweeps" / "paper" / "peft_benchmark.yaml", [f"settings.model={tmp_path}"])
    configs = [asked.confirmations(cell, {})[0] for cell in asked.cells()]
    assert [_projection(config).trained for config in configs] == [9175040, 129024, 4849664, 131072, 524288]
    base = unloaded(AutoModelForCausalLM, str(tmp_path))
    assert sum(p.numel() for p in base.parameters()) + 131072 == 3212880896


def _projection(config: RunConfig) -> Projection:
    layout = adapted_layout("causal", config.model, config.target_modules, config.r)
    return build(config.projection, layout=layout, d=config.d, seed=0, **config.hyperparameters)


@pytest.mark.slow
def test_commonsense_8b_trains_and_is_tested_on_all_eight(runs: Path, few_rows: str, llama: str, here) -> None:
    # 120 rows of each test, of which eight are drawn from each on average
    given = ["axes.projection=[unilora]", "~tune", "++settings.lr=1e-2", "settings.test_size=64"]
    found = _of_2026("commonsense_8b", runs, few_rows, llama, *given).iloc[0]
    assert found["task"] == "commonsense" and found["rows"] == 64
    assert set(found["groups"]) == set(TESTS) and len(TESTS) == 8
    assert found["score"] == pytest.approx(np.mean(list(found["groups"].values())))


def test_commonsense_is_scored_by_the_mean_of_its_tests(
    runs: Path, few_rows: str, llama: str, shared_data: str
) -> None:
    task = tasks.get("commonsense", shared_data)
    rows = task.split("test")
    assert rows["group"].nunique() == 8 and len(rows) == task.published["test"] == 22419
    right = pd.DataFrame({"label": 1, "prediction": (rows["group"] == "boolq").astype(int), "group": rows["group"]})
    assert task.scores(right)["accuracy"] == 1 / 8
    row = rows[rows["answer"] == "solution2"].iloc[0].to_dict()
    assert task.judge is not None
    assert task.judge("The correct answer is Solution2.", row) and not task.judge("solution1, not solution2", row)
    assert not task.judge("", row)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"question": "does ethanol take more energy make that produces", "answer": False}, "boolq"),
        (
            {
                "activity_label": "Roof shingle removal",
                "ctx": "A man is sitting on a roof. he",
                "endings": [
                    "is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                    "is holding a rubik's cube.", "starts pulling up roofing on a roof.",
                ],
                "label": "3",
            },
            "hellaswag",
        ),
        (
            {
                "question": "Which statement best explains why photosynthesis is the foundation of most food webs?",
                "choices": {
                    "label": np.array(["A", "B", "C", "D"]),
                    "text": np.array([
                        "Sunlight is the source of energy for nearly all ecosystems.",
                        "Most ecosystems are found on land instead of in water.",
                        "Carbon dioxide is more available than other gases.",
                        "The producers in all ecosystems are plants.",
                    ]),
                },
                "answerKey": "A",
            },
            "arc_easy",
        ),
        (
            {
                "sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
                "option1": "Sarah", "option2": "Maria", "answer": "2",
            },
            "winogrande",
        ),
        (
            {
                "context": "Tracy didn't go home that evening and resisted Riley's attacks.",
                "question": "What does Tracy need to do before this?",
                "answerA": "make a new plan", "answerB": "Go home and see Riley", "answerC": "Find somewhere to go",
                "label": "3",
            },
            "social_i_qa",
        ),
        (
            {
                "goal": "How do I ready a guinea pig cage for it's new occupants?",
                "sol1": "Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper "
                "strips, you will also need to supply it with a water bottle and a food dish.",
                "sol2": "Provide the guinea pig with a cage full of a few inches of bedding made of ripped jeans "
                "material, you will also need to supply it with a water bottle and a food dish.",
                "label": 0,
            },
            "piqa",
        ),
        (
            {
                "question_stem": "A person wants to start saving money so that they can afford a nice vacation at the "
                "end of the year. After looking over their budget and expenses, they decide the best way to save "
                "money is to",
                "choices": {
                    "label": np.array(["A", "B", "C", "D"]),
                    "text": np.array([
                        "make more phone calls", "quit eating lunch out", "buy less with monopoly money",
                        "have lunch with friends",
                    ]),
                },
                "answerKey": "B",
            },
            "openbookqa",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_hub_rows_are_recast_as_llm_adapters_publishes_them(raw: dict, name: str, shared_data: str) -> None:
    from experiments.tasks.commonsense import _test_rows

    published = _test_rows(name, shared_data)
    prompt, answer = TESTS[name].recast(raw)
    assert answer == published.loc[published["prompt"] == prompt, "answer"].iloc[0]


def test_label_noise_exchanges_answers_and_keeps_their_counts() -> None:
    from experiments.runs.data import with_noise

    rows = pd.DataFrame({"text": list("abcdefgh"), "label": range(8)})
    noisy = with_noise(rows, 0.5, seed=3)
    assert sorted(noisy["label"]) == list(range(8)) and noisy["text"].equals(rows["text"])
    assert (noisy["label"] != rows["label"]).sum() == 4
    assert with_noise(rows, 0.5, seed=3).equals(noisy) and with_noise(rows, 0.0, seed=3).equals(rows)


def test_generation_is_left_padded_and_does_not_depend_on_the_batch(runs: Path, few_rows: str, llama: str) -> None:
    from experiments.runs.folder import prepare
    from experiments.runs.resolve import resolve
    from experiments.runs.run import Run

    settings = {
        "task": "gsm8k",
        "data": few_rows,
        "model": llama,
        "projection": "unilora",
        "d": 64,
        "lr": 0.1,
        "seed": 0,
    }
    settings |= {"train_size": 8, "validation_size": 4, "max_new_tokens": 12, "max_length": 96}
    run = Run.load(prepare(runs, resolve(settings).to_json()))
    prompts = [run.family.prompt(text) for text in ("One?", "A question of many more words than the first, is it not?")]
    together = run.family.generate(run.trainer, prompts)
    alone = [run.family.generate(run.trainer, [prompt])[0] for prompt in prompts]
    assert together == alone == run.family.generate(run.trainer, prompts)


def test_completions_only_are_learned(runs: Path, few_rows: str, llama: str) -> None:
    from experiments.models import BaseModel
    from experiments.models.causal import CausalModel

    family = CausalModel(BaseModel(llama), tasks.get("gsm8k", few_rows), seed=0, max_length=512, max_new_tokens=16)
    (example,) = family.encode(pd.DataFrame({"prompt": ["How many?"], "completion": ["The answer is 5."]}))
    learned = [i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    assert family.processor.decode(learned) == "The answer is 5." + family.processor.eos_token
    assert json.dumps(example["input_ids"]).endswith(json.dumps(learned)[1:])

"""The score tables of the Uni-LoRA paper, and where ours come from."""

from __future__ import annotations

from experiments.names import method
from paper_figures.comparison import Comparison, Mean, Ours, Place

METHODS = {name: method(name) for name in ("lora", "unilora", "fastfood", "vera", "tied_lora", "vblora", "lora_xs")}
GLUE = {"SST-2": "sst2", "MRPC": "mrpc", "CoLA": "cola", "QNLI": "qnli", "RTE": "rte", "STS-B": "stsb"}
GLUE_COLUMNS = [*GLUE, "average"]
# of the others it is the accuracy, in %
GLUE_UNITS = {"CoLA": "Matthews x 100", "STS-B": "Pearson x 100", "average": "x 100"}
GLUE_PLACES: dict[str, Place | Mean] = {
    **{column: Place(f"glue/{task}") for column, task in GLUE.items()},
    "average": Mean([f"glue/{task}" for task in GLUE.values()]),
}
SMALL_GLUE = Ours("glue_budget", "MiniLM-L6 at one budget", GLUE_PLACES)
SMALL_NOTE = (
    "MiniLM-L6 (22.7 M numbers, 800 training rows, 3 epochs) stands in for RoBERTa, which needs a GPU. Its scores are "
    "not comparable with the published ones; the order of the methods at one budget is what it can show."
)
CIFAR = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
VIT = {"ViT-B": "google/vit-base-patch16-224-in21k", "ViT-L": "google/vit-large-patch16-224-in21k"}
VISION = {f"{c}, {v}": Place(task, model=model) for v, model in VIT.items() for c, task in CIFAR.items()}

MATH = {
    "GSM8K": Place("metamath", "gsm8k", "google/gemma-7b"),
    "MATH": Place("metamath", "math500", "google/gemma-7b"),
}


def _glue(size: str) -> Comparison:
    return Comparison(
        f"glue_{size}", f"GLUE, RoBERTa-{size}", f"RoBERTa-{size}", GLUE_COLUMNS, "%", METHODS,
        [Ours(f"glue_{size}", f"RoBERTa-{size}", GLUE_PLACES), SMALL_GLUE],
        ["In %: accuracy. The average is that of the six, each x 100.", SMALL_NOTE], GLUE_UNITS,
    )  # fmt: skip


COMPARISONS = [
    _glue("base"),
    _glue("large"),
    Comparison(
        "math", "Mathematical reasoning, Gemma-7B on MetaMathQA", "Gemma-7B", ["GSM8K", "MATH"], "%", METHODS,
        [
            Ours("math", "Gemma-7B", MATH),
            Ours("gsm8k_budget", "SmolLM2-135M on 64 solutions", {"GSM8K": Place("gsm8k")}),
        ],
        ["Ours on MATH: the 500 problems of MATH-500. SmolLM2-135M stands in for Gemma-7B, which needs a GPU."],
    ),
    Comparison(
        "instruction", "Instruction tuning, Llama-2-13B on Cleaned Alpaca", "Llama-2-13B", ["turn 1", "turn 2"],
        "MT-Bench", METHODS, [Ours("mt_bench", "Llama-2-13B", {})],
        ["MT-Bench is scored by a judge outside this repository: `experiments.mt_bench` writes the answers."],
    ),
    Comparison(
        "vision", "Image classification, ViT-B and ViT-L", "ViT", list(VISION), "%", METHODS,
        [Ours("vision", "ViT", VISION)],
    ),
]  # fmt: skip

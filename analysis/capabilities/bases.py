"""PEFT: kinds of base models and layers, and where their weights lie."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from analysis.capabilities.probe import Wrong, check, probe
from analysis.capabilities.subjects import (
    IDS,
    ROUNDING,
    SIZES,
    TARGETS,
    adapted,
    config,
    drift,
    gradient,
    life,
    llama,
    logits,
    make,
    moved,
    same,
    saved,
    saved_llama,
    steps,
    theta_d,
    trained,
)
from uniproj.tuner import UniProjConfig

BASES = "PEFT: base models and layers"
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def _ids(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS)[0]


def _mixtral() -> Any:
    return make(
        MixtralForCausalLM, MixtralConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, num_local_experts=4)
    )


def _small(**fields: Any) -> UniProjConfig:
    return UniProjConfig(projection="unilora", d=8, r=2, **fields)


@probe(BASES, "linear layers (Llama, grouped-query attention)")
def _(folder: Path) -> str:
    return life(llama(), _ids)


@probe(BASES, "`Conv1D`, fused q, k and v (GPT-2)")
def _(folder: Path) -> str:
    base = make(GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    return life(base, _ids, target_modules=["c_attn", "c_proj"])


@probe(BASES, "fused q, k and v in one linear layer (Phi-3, GPT-NeoX)")
def _(folder: Path) -> str:
    phi = make(Phi3ForCausalLM, Phi3Config(**SIZES, intermediate_size=64, num_key_value_heads=2, pad_token_id=0))
    neox = make(GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, intermediate_size=64))
    first = life(phi, _ids, target_modules=["qkv_proj", "gate_up_proj"])
    return f"{first}, {life(neox, _ids, target_modules=['query_key_value'])}"


@probe(BASES, "encoder and decoder (`SEQ_2_SEQ_LM`, T5)")
def _(folder: Path) -> str:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    base = make(T5ForConditionalGeneration, T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    return life(
        base,
        lambda model: model(input_ids=IDS, decoder_input_ids=IDS).logits,
        target_modules=["q", "v"],
        task_type="SEQ_2_SEQ_LM",
    )


@probe(BASES, "`TOKEN_CLS`, `QUESTION_ANS`, `FEATURE_EXTRACTION` (BERT)")
def _(folder: Path) -> None:
    for task, architecture in (
        ("TOKEN_CLS", BertForTokenClassification),
        ("QUESTION_ANS", BertForQuestionAnswering),
        ("FEATURE_EXTRACTION", BertModel),
    ):
        base = make(architecture, BertConfig(**SIZES, intermediate_size=64))
        life(base, _ids, target_modules=["query", "value"], task_type=task)


@probe(BASES, "images (ViT, no task type)")
def _(folder: Path) -> str:
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    base = make(ViTForImageClassification, ViTConfig(**sizes, intermediate_size=64, image_size=16, patch_size=8))
    pixels = torch.randn(2, 3, 16, 16)
    return life(base, lambda model: model(pixels).logits, target_modules=["q_proj", "v_proj"], task_type=None)


@probe(BASES, "state-space models (Mamba)")
def _(folder: Path) -> str:
    base = make(MambaForCausalLM, MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    return life(base, _ids, target_modules=["in_proj", "x_proj"])


@probe(BASES, "embeddings as targets")
def _(folder: Path) -> None:
    adapted(target_modules=["q_proj", "embed_tokens"])


@probe(BASES, "convolutions as targets")
def _(folder: Path) -> None:
    get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), _small(target_modules=["0"]))  # type: ignore[arg-type]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


@probe(BASES, "`nn.MultiheadAttention` as a target")
def _(folder: Path) -> None:
    get_peft_model(_Attention(), _small(target_modules=["attention"]))  # type: ignore[arg-type]


@probe(BASES, "the output projection within `nn.MultiheadAttention`")
def _(folder: Path) -> None:
    get_peft_model(_Attention(), _small(target_modules=["out_proj"]))  # type: ignore[arg-type]


@probe(BASES, "`nn.TransformerEncoder`: the same in training and in evaluation, where it has a fast path")
def _(folder: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model: Any = get_peft_model(nn.TransformerEncoder(layer, 2), _small(target_modules=["linear1", "linear2"]))  # type: ignore[arg-type]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        theta_d(model).mul_(30.0)
        found = model.eval()(x)
        same(found, model.train()(x), "outputs in training", ROUNDING)
        with model.disable_adapter():
            moved(found, model(x), "outputs")


class _PastTheAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.linear.weight)


@probe(BASES, "a module that reads the weight of an adapted layer in place of calling it")
def _(folder: Path) -> None:
    get_peft_model(_PastTheAdapter(), _small(target_modules=["linear"]))(torch.randn(3, 8))  # type: ignore[arg-type]


@probe(BASES, "tied embeddings beside adapted layers")
def _(folder: Path) -> str:
    return life(llama(tie_word_embeddings=True), _ids)


@probe(BASES, "a tied `lm_head` as a target: training")
def _(folder: Path) -> None:
    model = trained(llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    with model.disable_adapter():
        same(logits(model), logits(llama(tie_word_embeddings=True)), "logits without the adapter")


@probe(BASES, "a tied `lm_head` as a target: merging")
def _(folder: Path) -> None:
    model = trained(llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    expected = logits(model)
    same(logits(model.merge_and_unload()), expected, "logits merged", 1e-3)


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.router = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


@probe(BASES, "mixture of experts: experts that are modules")
def _(folder: Path) -> str:
    x = torch.randn(5, 8)
    return life(_Experts(), lambda model: model(x), target_modules=r"experts\.\d+", d=30, r=2, task_type=None)


@probe(BASES, "mixture of experts: attention beside fused experts (Mixtral)")
def _(folder: Path) -> str:
    return life(_mixtral(), _ids, target_modules=["q_proj", "v_proj"])


@probe(BASES, "mixture of experts: fused experts by their former names (Mixtral, `w1`, `w2`, `w3`)")
def _(folder: Path) -> None:
    adapted(_mixtral(), target_modules=["q_proj", "w1", "w2", "w3"])


@probe(BASES, "mixture of experts: the router (Mixtral)")
def _(folder: Path) -> None:
    adapted(_mixtral(), target_modules=["q_proj", "gate"])


def _halves(kinds: Iterable[torch.dtype]) -> str:
    remarks = []
    for dtype in kinds:
        model = adapted(llama().to(dtype))
        steps(model)
        check(theta_d(model).dtype == torch.float32, f"theta_d is {theta_d(model).dtype}")
        output, bare = logits(model.eval()), logits(llama().to(dtype))
        far = drift(logits(model.merge_and_unload()), output, bare)
        check(far < 1, f"merging into {dtype} loses the adapter: {far:.2f}")
        remarks.append(f"{str(dtype)[6:]} {far:.3f}")
    return f"merged logits off by this share of what the adapter changes of them: {', '.join(remarks)}"


@probe(BASES, "float16 and bfloat16 weights: training, merging")
def _(folder: Path) -> str:
    return _halves((torch.float16, torch.bfloat16))


@probe(BASES, "float64 weights")
def _(folder: Path) -> str:
    return life(llama().double(), _ids)


def _offloaded(folder: Path) -> Any:
    path = saved_llama(folder)
    options = {"device_map": DEVICE_MAP, "offload_folder": folder / "offload"}
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)


@probe(BASES, "`device_map` with layers on CPU and disk: forward, gradient, merging")
def _(folder: Path) -> None:
    model, whole = adapted(_offloaded(folder)), adapted()
    check(any(p.is_meta for p in model.parameters()), "nothing is offloaded")
    same(gradient(model), gradient(whole), "gradient on theta_d", 1e-6)
    expected = logits(whole.eval())
    same(logits(model.eval()), expected, "logits", 1e-6)
    same(logits(model.merge_and_unload()), expected, "logits merged", 1e-4)


@probe(BASES, "`device_map` with disk: methods made of base weights (LoRA-XS)")
def _(folder: Path) -> None:
    fields: dict[str, Any] = {"projection": "lora_xs", "d": None}
    with torch.no_grad():
        model, whole = adapted(_offloaded(folder), **fields), adapted(**fields)
        theta_d(model).fill_(0.1), theta_d(whole).fill_(0.1)
    same(logits(model), logits(whole), "logits", 1e-5)


@probe(BASES, "`device_map` with disk, without a GPU: `PeftModel.from_pretrained`")
def _(folder: Path) -> None:
    path, expected = saved(folder)
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(llama(), lora).save_pretrained(folder / "lora")
    try:
        PeftModel.from_pretrained(_offloaded(folder), folder / "lora", offload_folder=folder / "again")
    except NotImplementedError as error:
        raise Wrong(f"PEFT cannot do it for LoRA either: {error}") from None
    model = PeftModel.from_pretrained(_offloaded(folder), path, offload_folder=folder / "again")
    same(logits(model), expected, "logits", 1e-6)


@probe(BASES, "Accelerate's `cpu_offload`: every weight elsewhere")
def _(folder: Path) -> None:
    model = adapted(cpu_offload(llama(), execution_device=torch.device("cpu")))
    same(logits(model), logits(adapted()), "logits", 1e-6)


@probe(BASES, "a base on the meta device, filled in later")
def _(folder: Path) -> None:
    with torch.device("meta"):
        empty = type(llama())(llama().config)
    model = get_peft_model(empty, config())
    model.base_model.model.to_empty(device="cpu")
    check(theta_d(model).device.type == "cpu", "theta_d is on the meta device")

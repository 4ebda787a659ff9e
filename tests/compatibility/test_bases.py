"""PEFT: kinds of base models and layers, and where their weights lie."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
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
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from tests.compatibility.subjects import (
    IDS,
    ROUNDING,
    TARGETS,
    D,
    Refuses,
    Remark,
    adapted,
    config,
    drift,
    gpt2,
    gradient,
    life,
    llama,
    logits,
    modules,
    moved,
    projection,
    same,
    saved,
    saved_llama,
    steps,
    t5,
    theta_d,
    trained_model,
)
from tests.tuner.models import SIZES, make
from uniproj.errors import AdapterError
from uniproj.tuner import UniProjConfig

capability = partial(pytest.mark.capability, "PEFT: base models and layers")
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


_SMALL: dict[str, Any] = {"d": 8, "r": 2, "task_type": None}


def _small(**fields: Any) -> UniProjConfig:
    return UniProjConfig(**_SMALL, **fields)


def _refused(refuses: Refuses, base: Any, adapter_config: UniProjConfig) -> None:
    """At attaching, and the base stays as it was."""
    before = modules(base)
    with refuses():
        get_peft_model(base, adapter_config)
    assert modules(base) == before


@capability("linear layers (Llama, grouped-query attention)")
def test_linear_layers_llama_grouped_query_attention(remark: Remark) -> None:
    remark(life(llama(), _ids))


@capability("`Conv1D`, fused q, k and v (GPT-2)")
def test_conv1d_fused_q_k_and_v_gpt_2(remark: Remark) -> None:
    remark(life(gpt2(), _ids, target_modules=["c_attn", "c_proj"]))


@capability("fused q, k and v in one linear layer (Phi-3, GPT-NeoX)")
def test_fused_q_k_and_v_in_one_linear_layer_phi_3_gpt_neox(remark: Remark) -> None:
    phi = make(Phi3ForCausalLM, Phi3Config(**SIZES, intermediate_size=64, num_key_value_heads=2, pad_token_id=0))
    neox = make(GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, intermediate_size=64))
    first = life(phi, _ids, target_modules=["qkv_proj", "gate_up_proj"])
    remark(f"{first}, {life(neox, _ids, target_modules=['query_key_value'])}")


@capability("encoder and decoder (`SEQ_2_SEQ_LM`, T5)")
def test_encoder_and_decoder_seq_2_seq_lm_t5(remark: Remark) -> None:
    def call(model: nn.Module) -> torch.Tensor:
        return model(input_ids=IDS, decoder_input_ids=IDS).logits

    remark(life(t5(), call, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))


@capability("`TOKEN_CLS`, `QUESTION_ANS`, `FEATURE_EXTRACTION` (BERT)")
def test_token_cls_question_ans_feature_extraction_bert() -> None:
    for task, architecture in (
        ("TOKEN_CLS", BertForTokenClassification),
        ("QUESTION_ANS", BertForQuestionAnswering),
        ("FEATURE_EXTRACTION", BertModel),
    ):
        base = make(architecture, BertConfig(**SIZES, intermediate_size=64))
        life(base, _ids, target_modules=["query", "value"], task_type=task)


@capability("images (ViT, no task type)")
def test_images_vit_no_task_type(remark: Remark) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    base = make(ViTForImageClassification, ViTConfig(**sizes, intermediate_size=64, image_size=16, patch_size=8))
    pixels = torch.randn(2, 3, 16, 16)
    remark(life(base, lambda model: model(pixels).logits, target_modules=["q_proj", "v_proj"], task_type=None))


@capability("state-space models (Mamba)")
def test_state_space_models_mamba(remark: Remark) -> None:
    base = make(MambaForCausalLM, MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    remark(life(base, _ids, target_modules=["in_proj", "x_proj"]))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


@capability("embeddings as targets")
def test_embeddings_as_targets(remark: Remark) -> None:
    remark(life(llama(), _ids, target_modules=["q_proj", "embed_tokens"]))


@capability("convolutions as targets: `Conv1d`, `Conv2d`, `Conv3d`")
def test_convolutions_as_targets(remark: Remark) -> None:
    kinds, x = (nn.Conv1d, nn.Conv2d, nn.Conv3d), torch.randn(2, 4, 5, 5, 5)
    for axes, kind in enumerate(kinds, 1):
        image = x[(..., *[0] * (3 - axes))]
        life(nn.Sequential(kind(4, 6, 3)), lambda model, x=image: model(x), **_SMALL, target_modules=["0"])
    remark("one with groups does not merge: its A sees all channels")


@capability("`nn.MultiheadAttention` as a target")
def test_nn_multiheadattention_as_a_target(remark: Remark) -> None:
    x = torch.randn(3, 2, 8)
    remark(life(_Attention(), lambda model: model(x), **_SMALL, target_modules=["attention"]))


@capability("the output projection alone within `nn.MultiheadAttention`")
def test_the_output_projection_alone_within_nn_multiheadattention(refuses: Refuses) -> None:
    _refused(refuses, _Attention(), _small(target_modules=["out_proj"]))


@capability("`nn.TransformerEncoder`: the same in training and in evaluation, where it has a fast path")
def test_nn_transformerencoder_the_same_in_training_and_in_evaluation_where_it_has_a_fast_path() -> None:
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


@capability("a module that reads the weight of an adapted layer in place of calling it")
def test_a_module_that_reads_the_weight_of_an_adapted_layer_in_place_of_calling_it(refuses: Refuses) -> None:
    model = get_peft_model(_PastTheAdapter(), _small(target_modules=["linear"]))
    with refuses():
        model(torch.randn(3, 8))


@capability("tied embeddings beside adapted layers")
def test_tied_embeddings_beside_adapted_layers(remark: Remark) -> None:
    remark(life(llama(tie_word_embeddings=True), _ids))


@capability("a tied `lm_head` as a target: training")
def test_a_tied_lm_head_as_a_target_training() -> None:
    model = trained_model(llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    with model.disable_adapter():
        same(logits(model), logits(llama(tie_word_embeddings=True)), "logits without the adapter")


@capability("a tied `lm_head` as a target: merging")
def test_a_tied_lm_head_as_a_target_merging(refuses: Refuses) -> None:
    model = trained_model(llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    expected = logits(model)
    with refuses():
        model.merge_and_unload()
    same(logits(model), expected, "logits")


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.router = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


@capability("mixture of experts: experts that are modules")
def test_mixture_of_experts_experts_that_are_modules(remark: Remark) -> None:
    x = torch.randn(5, 8)
    remark(life(_Experts(), lambda model: model(x), target_modules=r"experts\.\d+", d=30, r=2, task_type=None))


@capability("mixture of experts: attention beside fused experts (Mixtral)")
def test_mixture_of_experts_attention_beside_fused_experts_mixtral(remark: Remark) -> None:
    remark(life(_mixtral(), _ids, target_modules=["q_proj", "v_proj"]))


@capability("mixture of experts: fused experts and the router as `target_parameters` (Mixtral)")
def test_mixture_of_experts_fused_experts_and_the_router_as_target_parameters_mixtral(remark: Remark) -> None:
    parameters = ["gate_up_proj", "down_proj", "gate.weight"]
    remark(life(_mixtral(), _ids, r=2, target_modules=["q_proj", "v_proj"], target_parameters=parameters))


@capability("mixture of experts: fused experts by their former names (Mixtral, `w1`, `w2`, `w3`)")
def test_mixture_of_experts_fused_experts_by_their_former_names_mixtral_w1_w2_w3(refuses: Refuses) -> None:
    with pytest.raises(AdapterError, match="got 'gate_up_proj', which is none"):
        adapted(_mixtral(), target_modules=["q_proj", "gate_up_proj"])
    _refused(refuses, _mixtral(), config(target_modules=["q_proj", "w1", "w2", "w3"]))


@capability("mixture of experts: the router as a module (Mixtral)")
def test_mixture_of_experts_the_router_as_a_module_mixtral(refuses: Refuses) -> None:
    with refuses(ValueError):
        adapted(_mixtral(), target_modules=["q_proj", "gate"])


@capability("float16 and bfloat16 weights: training, merging")
def test_float16_and_bfloat16_weights_training_merging(remark: Remark) -> None:
    remarks = []
    for dtype in (torch.float16, torch.bfloat16):
        model = adapted(llama().to(dtype))
        steps(model)
        assert theta_d(model).dtype == torch.float32
        M = projection(model).to_dense()
        assert (M.T @ M - torch.eye(D)).abs().max() < 1e-12
        output, bare = logits(model.eval()), logits(llama().to(dtype))
        far = drift(logits(model.merge_and_unload()), output, bare)
        assert far < 1
        remarks.append(f"{str(dtype)[6:]} {far:.3f}")
    remark(f"merged logits off by this share of what the adapter changes of them: {', '.join(remarks)}")


@capability("float64 weights")
def test_float64_weights(remark: Remark) -> None:
    remark(life(llama().double(), _ids))


def _offloaded(folder: Path) -> Any:
    path = saved_llama(folder)
    options = {"device_map": DEVICE_MAP, "offload_folder": folder / "offload"}
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)


def _as_in_memory(folder: Path, **fields: Any) -> None:
    """Forward, gradient and merging, of layers on CPU and disk and of those on disk alone."""
    for targets in (TARGETS, r".*layers\.1\..*(q_proj|down_proj)"):
        model, whole = (
            adapted(_offloaded(folder), target_modules=targets, **fields),
            adapted(target_modules=targets, **fields),
        )
        assert any(p.is_meta for p in model.parameters())
        with torch.no_grad():
            theta_d(model).fill_(0.1), theta_d(whole).fill_(0.1)
        same(gradient(model), gradient(whole), "gradient on theta_d", 1e-5)
        expected = logits(whole.eval())
        same(logits(model.eval()), expected, "logits", 1e-5)
        same(logits(model.merge_and_unload()), expected, "logits merged", ROUNDING)


@capability("`device_map` with layers on CPU and disk: forward, gradient, merging")
def test_device_map_with_layers_on_cpu_and_disk_forward_gradient_merging(tmp_path: Path) -> None:
    _as_in_memory(tmp_path)


@capability("`device_map` with disk: methods made of base weights (LoRA-XS)")
def test_device_map_with_disk_methods_made_of_base_weights_lora_xs(tmp_path: Path) -> None:
    _as_in_memory(tmp_path, projection="lora_xs", d=None)


@capability("`device_map` with disk, without a GPU: `PeftModel.from_pretrained`")
def test_device_map_with_disk_without_a_gpu_peftmodel_from_pretrained(tmp_path: Path) -> None:
    path, expected = saved(tmp_path)
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(llama(), lora).save_pretrained(tmp_path / "lora")
    try:
        PeftModel.from_pretrained(_offloaded(tmp_path), tmp_path / "lora", offload_folder=tmp_path / "again")
    except NotImplementedError as error:
        pytest.xfail(f"PEFT cannot do it for LoRA either: {error}")
    model = PeftModel.from_pretrained(_offloaded(tmp_path), path, offload_folder=tmp_path / "again")
    same(logits(model), expected, "logits", 1e-6)


@capability("Accelerate's `cpu_offload`: every weight elsewhere")
def test_accelerate_s_cpu_offload_every_weight_elsewhere() -> None:
    model = adapted(cpu_offload(llama(), execution_device=torch.device("cpu")))
    same(logits(model), logits(adapted()), "logits", 1e-6)


@capability("a base on the meta device, filled in later")
def test_a_base_on_the_meta_device_filled_in_later() -> None:
    with torch.device("meta"):
        empty = type(llama())(llama().config)
    model = get_peft_model(empty, config())
    model.base_model.model.to_empty(device="cpu")
    assert theta_d(model).device.type == "cpu"

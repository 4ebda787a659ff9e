"""llama.cpp runs every architecture that GGUF is written for: which rows it wants in which order it alone knows.

Small models of random weights become GGUF files here by the rules of llama.cpp's `conversion/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, TokenType, get_tensor_name_map
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.engines.engine import ENGINES
from tests.exchange.test_gguf import NEIGHBOURS
from tests.tuner.models import make
from uniproj.exchange import export
from uniproj.exchange.formats.gguf import ARCHITECTURES
from uniproj.tuner import UniProjConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# three that every vocabulary has, and bytes that are letters by themselves: the server keeps back parts of others
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(128))]
TYPES = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 128]
# five layers, as smollm3 turns none in each fourth
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPTS = [[1, 70, 90, 110, 130, 50, 71, 91, 111, 30], [1, 100, 40, 100, 41, 100]]
NEW_TOKENS = 6


def _order(name: str, weight: Tensor, model: PreTrainedModel) -> Tensor:
    """As the converter has it."""
    kind = model.config.model_type
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    if kind in NEIGHBOURS and name.endswith(("q_proj.weight", "k_proj.weight")):
        halves = weight.view(-1, 2, SIZES["head_dim"] // 2, weight.shape[1])
        return torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(weight.shape)
    return weight


def _write(model: PreTrainedModel, path: Path) -> None:
    config = model.config
    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if a.name == ARCHITECTURES[config.model_type])
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(SIZES["head_dim"])
    writer.add_value_length(SIZES["head_dim"])
    writer.add_rope_dimension_count(SIZES["head_dim"])
    ropes: dict[str, Any] = config.rope_parameters
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(0 if config.model_type == "phi3" else getattr(config, "sliding_window", None) or 4096)
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(4096)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types(TYPES)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), _order(name, weight, model).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_llama_cpp_and_pytorch_agree(kind: str, tmp_path: Path) -> None:
    described = AutoConfig.for_model(kind, **SIZES)
    described.tie_word_embeddings = kind.startswith("gemma")
    base = make(AutoModelForCausalLM.from_config, described)
    _write(base, tmp_path / "base.gguf")
    config = UniProjConfig(projection="unilora", d=60, r=4, lora_alpha=12, target_modules="all-linear")
    model = get_peft_model(base, config).eval()
    next(p for p in model.parameters() if p.requires_grad).normal_(generator=torch.Generator().manual_seed(0))
    export(model, tmp_path / "ada.gguf", to="gguf")
    asked = {
        "gguf": str(tmp_path / "base.gguf"),
        "adapters": {"ada": str(tmp_path / "ada.gguf")},
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
    }
    for prompt, found in zip(PROMPTS, ENGINES["llama_cpp"].ask(asked, tmp_path)["users"]["ada"], strict=True):
        given, tokens = torch.tensor([[*prompt, *found["tokens"]]]), torch.tensor(found["tokens"])[:, None]
        rows = slice(len(prompt) - 1, -1)
        with model.disable_adapter():
            untouched = model(given).logits[0, rows].log_softmax(-1).gather(1, tokens)[:, 0]
        ours = model(given).logits[0, rows].log_softmax(-1)
        wanted, theirs = ours.gather(1, tokens)[:, 0], torch.tensor(found["logprobs"])
        assert found["tokens"] == ours.argmax(-1).tolist()
        # a factor in a wrong order or scale is as far off as none
        assert (theirs - wanted).abs().max() < 0.01 * (wanted - untouched).abs().max(), (theirs, wanted, untouched)
        print(kind, f"{(theirs - wanted).abs().max():.1e} of {(wanted - untouched).abs().max():.2f}")

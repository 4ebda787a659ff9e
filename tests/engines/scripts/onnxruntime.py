# /// script
# dependencies = [
#     "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2",
#     "onnx==1.23.2", "onnx-ir==1.1.0", "onnxruntime==1.32.0", "onnxruntime-genai==0.18.0",
# ]
# [tool.uniproj]
# label = "ONNX Runtime GenAI"
# format = "onnx"
# precision = "float32"
# packages = ["onnxruntime-genai", "onnxruntime", "onnx"]
# ///
"""ONNX Runtime GenAI, both users' adapters in one model whose factors are inputs; each sequence has one of them."""

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
from onnxruntime_genai import Adapters, Generator, GeneratorParams, Model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    _build(asked["base"])
    model = Model("onnx")
    adapters = Adapters(model)
    for user, path in asked["adapters"].items():
        adapters.load(path, user)
    users = {}
    for user in asked["adapters"]:
        users[user] = []
        for prompt in asked["prompts"]:
            parameters = GeneratorParams(model)
            parameters.set_search_options(max_length=len(prompt) + asked["new_tokens"], do_sample=False)
            generator = Generator(model, parameters)
            generator.set_active_adapter(adapters, user)
            generator.append_tokens(np.array(prompt, np.int32))
            users[user].append(_continuation(generator))
    return {"users": users, "together": True}


def _build(base: str) -> None:
    """The model in `onnx`, where every LoRA factor is an input that is by default that of a LoRA of PEFT's, B = 0."""
    lora = LoraConfig(r=RANK, target_modules=MODULES)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained("untrained")
    options = ["-i", base, "-o", "onnx", "-p", "fp32", "-e", "cpu", "-c", "cache"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options]
    subprocess.run([*command, "--extra_options", "adapter_path=untrained"], check=True)
    model = onnx.load("onnx/model.onnx", load_external_data=False)
    for x in model.graph.initializer:
        if ".lora_" in x.name:
            shape = [None if size == RANK else size for size in x.dims]
            model.graph.input.append(onnx.helper.make_tensor_value_info(x.name, x.data_type, shape))
    onnx.save(model, "onnx/model.onnx")


def _continuation(generator: Generator) -> dict[str, list]:
    tokens, logprobs = [], []
    while not generator.is_done():
        logits = generator.get_logits().astype(np.float64)[0, -1]
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
        logprobs.append(float(logits[tokens[-1]] - np.logaddexp.reduce(logits)))
    return {"tokens": tokens, "logprobs": logprobs}

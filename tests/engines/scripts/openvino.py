# /// script
# dependencies = [
#     "torch==2.13.0", "transformers==5.5.4", "optimum-intel==2.2.0",
#     "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", "openvino-genai==2026.4.1.0",
# ]
# [tool.uniproj]
# label = "OpenVINO GenAI"
# format = "openvino"
# precision = "float32"
# running_sum = true
# packages = ["openvino-genai", "openvino", "optimum-intel"]
# removed = ["torchvision"]
# ///
"""OpenVINO GenAI, both users' adapters in one pipeline: a batch is of one user, and the next batch changes to another.

The torchvision that comes along is not built for the CPU's torch.
"""

from typing import Any

import numpy as np
from openvino import Tensor
from openvino_genai import Adapter, AdapterConfig, ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    exact = OVConfig(dtype="fp32")
    main_export(asked["base"], "ov", task="text-generation-with-past", ov_config=exact, convert_tokenizer=True)
    adapters = {user: Adapter(f"{path}/adapter_model.safetensors") for user, path in asked["adapters"].items()}
    known = {"adapters": AdapterConfig([*adapters.values()])}
    pipeline = ContinuousBatchingPipeline("ov", SchedulerConfig(), "CPU", {**known, **EXACT})
    prompts = [Tensor(np.array([prompt])) for prompt in asked["prompts"]]
    users = {}
    for user, adapter in adapters.items():
        config = GenerationConfig(max_new_tokens=asked["new_tokens"], logprobs=1)
        config.adapters = AdapterConfig(adapter)
        # it alone changes the adapter; the log-probabilities of single tokens only a request tells
        pipeline.generate(prompts, [config] * len(prompts))
        requests = [pipeline.add_request(number, prompt, config) for number, prompt in enumerate(prompts)]
        while pipeline.has_non_finished_requests():
            pipeline.step()
        users[user] = [_continuation(request.read_all()) for request in requests]
    return {"users": users, "together": True}


def _continuation(read: list[Any]) -> dict[str, list]:
    (output,) = read
    return {"tokens": output.generated_ids, "logprobs": output.generated_log_probs}

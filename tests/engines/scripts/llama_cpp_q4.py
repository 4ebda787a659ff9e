# /// script
# dependencies = ["xllamacpp==2026.10.11549", "gguf==0.19.0"]
# [tool.uniproj]
# label = "llama.cpp"
# format = "gguf_f16"
# precision = "q8"
# packages = ["xllamacpp"]
# ///
"""The packaged model as it is, in 4 bits, by llama.cpp's own settings."""

import runpy
from pathlib import Path
from typing import Any

import xllamacpp as xlc

SHARED = runpy.run_path(str(Path(__file__).with_name("llama_cpp.py")))


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    server = xlc.Server(SHARED["parameters"](asked["gguf"], asked))
    return SHARED["answers"](asked, lambda *request: whole(server, *request))


def whole(server, prompt: list[int], new_tokens: int, adapter: int) -> dict[str, Any]:
    places = SHARED["completed"](server, prompt, new_tokens, adapter)
    return {"tokens": [place["id"] for place in places], "logprobs": [place["logprob"] for place in places]}

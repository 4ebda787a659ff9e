"""The model card beside a saved adapter, and how models that hold one of ours go to the Hub.

PEFT writes a template to be filled in, and names the place of a base model on this machine; Transformers' `push_to_hub`
puts a card of Transformers in its place. Importing `uniproj.tuner` replaces both by thin wrappers, which call the
original for any other adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import PreTrainedModel

from uniproj import hub
from uniproj.format import card, file
from uniproj.format.disk import replace
from uniproj.format.header import Header
from uniproj.tuner.attached import adapter_of
from uniproj.tuner.injected import tuner_on

_theirs = PeftModel.create_or_update_model_card
_theirs_push, _theirs_push_injected = PeftModel.push_to_hub, PreTrainedModel.push_to_hub
_PLACE = "Use the code below to get started with the model.\n\n[More Information Needed]"  # in the Hub's template
_BESIDE, _HERE = "default", "the folder of this file, or its name on the Hub"


def _create_or_update_model_card(model: PeftModel, output_dir: str) -> None:
    ours = [name for name, config in model.peft_config.items() if config.peft_type == file.KIND]
    if not ours:
        _theirs(model, output_dir)
        return
    # of several adapters that of this name lies beside the card, the others in folders below
    name = _BESIDE if _BESIDE in ours else ours[0]
    path = Path(output_dir, card.CARD)
    # a link may lead to the file of somebody else
    there = path.read_text("utf-8") if path.is_file() and not path.is_symlink() else None
    fields, P = model.peft_config[name].to_dict(), adapter_of(model, name).P
    header = Header.of(fields, P, model.base_model.model)
    known = card.published(header)
    labels = getattr(getattr(model.base_model.model, "config", None), "num_labels", None)
    if name == _BESIDE and (there is None or card.is_ours(there)):
        text = card.of_adapter(known, fields, _HERE, P.trained, title="Adapter of uniproj", labels=labels)
    else:
        text = _updated(model, there, card.loading(fields, _HERE, known, labels))
        text = card.without_place(text, header.base_model)
    replace({path: text.encode()})


def _updated(model: PeftModel, there: str | None, loading: str) -> str:
    """A card as PEFT writes it or updates the one that is there, with the lines that load an adapter, and all tags."""
    with TemporaryDirectory() as apart:
        draft = Path(apart, card.CARD)
        if there is not None:
            draft.write_bytes(there.encode())
        _theirs(model, apart)
        found = ModelCard.load(draft)
    tags = ModelCard(there).data.get("tags") if there is not None and there.startswith("---") else None
    found.data.tags = sorted({*map(str, tags or ()), *(found.data.tags or ()), card.TAG})
    if _PLACE in found.text:
        found.text = found.text.replace(_PLACE, loading)
    elif "import uniproj" not in found.text:
        found.text += f"\n\n## How to load it\n\n{loading}\n"
    return str(found)


def _pushes(theirs: Callable[..., Any], holds_ours: Callable[[Any], bool]) -> Callable[..., Any]:
    @wraps(theirs)
    def push_to_hub(self: Any, repo_id: str, **options: Any) -> Any:
        if not holds_ours(self):
            return theirs(self, repo_id, **options)
        options.pop("max_shard_size", None)  # an adapter is one file
        tags = options.pop("tags", None) or ()
        done = hub.push(self, repo_id, tags=[tags] if isinstance(tags, str) else tags, **options)
        return done if done.commit is None else done.commit

    return push_to_hub


def _is_ours(model: PeftModel) -> bool:
    return any(config.peft_type == file.KIND for config in model.peft_config.values())


def install() -> None:
    """Put the wrappers in the place of PEFT's and Transformers' functions."""
    PeftModel.create_or_update_model_card = _create_or_update_model_card
    PeftModel.push_to_hub = _pushes(_theirs_push, _is_ours)
    PreTrainedModel.push_to_hub = _pushes(
        _theirs_push_injected, lambda model: bool(getattr(tuner_on(model), "peft_config", None))
    )

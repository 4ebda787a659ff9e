"""The model card beside a saved adapter: PEFT's own, with the lines that load an adapter of this method."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard
from peft import PeftModel

from uniproj.format import file
from uniproj.format.disk import replace

_theirs = PeftModel.create_or_update_model_card

_TAG = "uniproj"
PLACE = "Use the code below to get started with the model.\n\n[More Information Needed]"  # in the Hub's template
_LOADING = """\
PEFT knows the method of this adapter, UNIPROJ, once uniproj is imported (`pip install uniproj`):

```python
import uniproj
from peft import PeftModel

# base_model: the model that the adapter was trained on, as it was loaded then
model = PeftModel.from_pretrained(base_model, "the folder of this file, or its name on the Hub")
```"""


def _create_or_update_model_card(model: PeftModel, output_dir: str) -> None:
    if all(config.peft_type != file.KIND for config in model.peft_config.values()):
        _theirs(model, output_dir)
        return
    path = Path(output_dir, "README.md")
    with TemporaryDirectory() as apart:  # PEFT would follow a symbolic link in the folder
        draft = Path(apart, path.name)
        if path.is_file() and not path.is_symlink():
            draft.write_bytes(path.read_bytes())
        _theirs(model, apart)
        card = ModelCard.load(draft)
    card.data.tags = sorted({*(card.data.tags or []), _TAG})
    if PLACE in card.text:
        card.text = card.text.replace(PLACE, _LOADING)
    elif "import uniproj" not in card.text:
        card.text += f"\n\n## How to Get Started with the Model\n\n{_LOADING}\n"
    replace({path: str(card).encode()})


def install() -> None:
    """Put the wrapper in the place of PEFT's function."""
    PeftModel.create_or_update_model_card = _create_or_update_model_card

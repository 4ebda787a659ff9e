"""The PEFT method `UNIPROJ`: any projection trains any model that PEFT's LoRA can adapt.

Importing this package enters the method into PEFT's own dictionaries, so `get_peft_model`,
`PeftModel.from_pretrained` and the Transformers `Trainer` know it; `uniproj.tuner.files` takes over its files,
`uniproj.tuner.entry_points` what Transformers' models do with adapters by themselves, and
`uniproj.tuner.card` what is written on the model card and uploaded. Where PEFT is used, `import uniproj` imports this
package.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from uniproj.tuner import card, entry_points, files
from uniproj.tuner.attached import Attached, adapter_of, tuner_of
from uniproj.tuner.config import PEFT_TYPE, UniProjConfig
from uniproj.tuner.distributed import shard_base
from uniproj.tuner.model import UniProjModel

PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = UniProjConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = UniProjModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = UniProjModel.prefix
files.install()
entry_points.install()
card.install()

__all__ = ["Attached", "UniProjConfig", "UniProjModel", "adapter_of", "shard_base", "tuner_of"]

"""uniproj: parameter sharing for LoRA as one linear map, theta_D = P theta_d + c.

The whole interface is what this package exports, and

    uniproj.tuner       UniProjConfig: the PEFT method; adapter_of: P and theta_d of a model
    uniproj.exchange    export, import_adapter: foreign formats; from_peft, to_peft: PEFT's own methods
    uniproj.exchange.nearest  least_squares, captured: what a projection keeps of a LoRA
    uniproj.exchange.formats.lora  read, write: PEFT's LoRA folders
    uniproj.algebra     projections made of projections
    uniproj.claims      what a projection may claim, each decided from its matrix
    uniproj.testing     check_projection: the tests of a projection of one's own; sample: one to test
    uniproj.budget      Budget, for a method of one's own
    uniproj.kernels.random   numbers that are the same everywhere
    uniproj.bank        the adapters of many users
    uniproj.hub         push: an adapter and its card to the Hub; upload: any folder

`import uniproj` is all that PEFT needs to know the method UNIPROJ of a saved adapter: `uniproj.tuner`, which enters it
there, is imported as soon as PEFT is, before or after this package, and never by those who do not use PEFT.
"""

from importlib import import_module

from wrapt import when_imported

from uniproj import limits
from uniproj.errors import AdapterError, ProjectionError
from uniproj.layout import Block, LoRALayout, Site
from uniproj.projection import Projection
from uniproj.registry import build, get, names, register

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "Block",
    "LoRALayout",
    "Projection",
    "ProjectionError",
    "Site",
    "build",
    "get",
    "limits",
    "names",
    "register",
]


when_imported("peft")(lambda peft: import_module("uniproj.tuner"))

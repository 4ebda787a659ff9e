"""uniproj: parameter sharing for LoRA as one linear map, theta_D = P theta_d + c."""

from uniproj.errors import AdapterError, ProjectionError
from uniproj.layout import Block, LoRALayout
from uniproj.projection import Projection
from uniproj.registry import build, get, names, register

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "Block",
    "LoRALayout",
    "Projection",
    "ProjectionError",
    "build",
    "get",
    "names",
    "register",
]

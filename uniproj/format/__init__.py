"""An adapter on disk: what a file says of itself, how it is read, written, checked and renamed.

Plain dictionaries in the place of configurations: nothing here knows the tuner, or imports PEFT.
"""

from uniproj.format.compatibility import Difference, check_layout, first_difference
from uniproj.format.fields import FIELDS, Role
from uniproj.format.file import CONFIG, WEIGHTS, SavedAdapter, of_weights, read, write
from uniproj.format.header import FORMAT_VERSION, Header
from uniproj.format.keys import HEADS, THETA_D
from uniproj.format.places import adapted_modules, layout_on

__all__ = [
    "CONFIG",
    "FIELDS",
    "FORMAT_VERSION",
    "HEADS",
    "THETA_D",
    "WEIGHTS",
    "Difference",
    "Header",
    "Role",
    "SavedAdapter",
    "adapted_modules",
    "check_layout",
    "first_difference",
    "layout_on",
    "of_weights",
    "read",
    "write",
]

"""A matrix as a picture within the page."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from analysis.cards import ROUNDING

POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)


def heat_map(values: np.ndarray) -> str:
    """A heat map as a data URI: opacity is |value| / max, blue above zero and orange below; zero shows the page."""
    strength = np.abs(values) / max(float(np.abs(values).max()), 1e-300)
    strength[strength < ROUNDING] = 0.0
    pixels = np.zeros((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where((values >= 0)[..., None], POSITIVE, NEGATIVE)
    pixels[..., 3] = np.rint(255 * strength)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="png")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()

"""Vision transformers with a classification head."""

from __future__ import annotations

import io
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from experiments.models.classifier import Classifier, count_labels
from experiments.models.pretrained import load_image_classifier, load_image_processor


class ImageClassifier(Classifier):
    """CIFAR and folders of pictures on any model that Transformers can give an image-classification head."""

    # PEFT has no task type for images: the fresh head is named instead
    task_type = None
    auto = AutoModelForImageClassification
    by_length = False
    modules_to_save = ("classifier",)

    @cached_property
    def processor(self) -> Any:
        return load_image_processor(self.base.name)

    def load(self, rows: pd.DataFrame) -> PreTrainedModel:
        labels = count_labels(rows["label"].to_numpy())
        return load_image_classifier(self.base, labels, self.seed)

    def encode(self, rows: pd.DataFrame) -> Dataset:
        return Dataset.from_dict({"image": rows["image"].tolist(), "label": rows["label"].tolist()})

    def collate(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = [_opened(feature["image"]) for feature in features]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([feature["label"] for feature in features])}

    @staticmethod
    def made_up_row(config: PretrainedConfig) -> dict[str, torch.Tensor]:
        side = getattr(config, "image_size", 224)
        height, width = (side, side) if isinstance(side, int) else side
        pixels = torch.ones(1, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": pixels, "labels": torch.zeros(1, dtype=torch.long)}


def _opened(image: dict[str, Any]) -> Image.Image:
    """A picture stored as bytes, or by its path."""
    content = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
    with Image.open(content) as picture:
        return picture.convert("RGB")

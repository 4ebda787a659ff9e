"""The families of models: text classifiers, image classifiers, causal language models."""

from experiments.families.family import Family, adapted_shapes, get

__all__ = ["Family", "adapted_shapes", "get"]

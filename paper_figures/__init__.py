"""Tables and figures of the Uni-LoRA paper and our own: records and analysis tables, read and drawn."""

from paper_figures.committed import Committed
from paper_figures.registry import Product, register
from paper_figures.typesetting import Table

__all__ = ["Committed", "Product", "Table", "register"]

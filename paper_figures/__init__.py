"""Tables and figures of the Uni-LoRA paper and our own: records and analysis tables, read and drawn."""

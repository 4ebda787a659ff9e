"""What a bank of adapters costs beside PEFT's own adapters, and what it bears."""

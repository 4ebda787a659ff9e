"""What a bank of adapters costs beside PEFT's own adapters, and that killed processes lose nothing in it."""

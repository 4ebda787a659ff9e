"""What a GPU says of the kernels, a training step, decoding and mixed batches, in one command of eight minutes."""

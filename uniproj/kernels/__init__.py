"""The arithmetic that projections share: counter-based random bits, keyed permutations, Hadamard transforms."""

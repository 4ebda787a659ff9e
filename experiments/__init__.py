"""Experiments on real models and data, started with `python -m experiments.<name>`.

Each package imports only those above it: `tasks` (data and metrics), `models` (bases and how they are trained on rows),
`runs` (one run and its folder), `records` (what finished runs say, and the only statistics), `sweeps` (many runs out of
one file), `evaluate` (finished runs on the tests of others). The files beside them are the commands and what all share.
"""

from uniproj import console

console.quiet_bitsandbytes()

"""Measurements of projections: each is a package or module that runs as `python -m analysis.<name>`."""

from uniproj import console

console.quiet_bitsandbytes()

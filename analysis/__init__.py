"""Measurements of projections: each is a package or module that runs as `python -m analysis.<name>`."""

from contextlib import suppress

# `analysis.gpu` names all packages that are missing, of which this import would name the first
with suppress(ModuleNotFoundError):
    from uniproj import console

    console.quiet_bitsandbytes()

"""Adapters out of uniproj and into it: foreign formats, compression, and the commands on saved adapters."""

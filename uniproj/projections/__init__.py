"""One file per family of methods; the registry imports every file of this folder."""

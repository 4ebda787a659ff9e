"""Foreign formats, one file each, which bears the name that `export --to` takes and registers a `Format`."""

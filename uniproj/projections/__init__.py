"""One file per method, under its registered name; shared bases have a leading underscore and register nothing."""

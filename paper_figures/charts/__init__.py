"""One file per figure; each draws what it is given, and names what is missing."""

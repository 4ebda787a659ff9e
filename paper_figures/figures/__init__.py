"""One file per figure, with its table where it has one; each draws what it is given, and names what is missing."""

"""The live view: local pages over all runs below a directory, which other programs write meanwhile."""

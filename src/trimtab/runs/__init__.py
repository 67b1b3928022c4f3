"""Runs: a directory that can be resumed, the loop that does it, and trackers."""

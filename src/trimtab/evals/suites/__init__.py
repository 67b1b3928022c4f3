"""Suites: fixed sets of questions with a scoring of their own. One file each, and a line in the registry's table."""

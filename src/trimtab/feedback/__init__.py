"""Human judgements: how they are collected, what they are worth and how they become preference pairs (no torch)."""

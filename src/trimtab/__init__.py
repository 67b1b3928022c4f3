"""trimtab: the whole RLHF loop, from human judgements to an aligned model and the evidence that it is aligned."""

__version__ = "0.1.0"

"""Rewards of replies as plain functions, for run files of tests: `callable` finds them by module and name."""

import torch


def length(prompt, response, facts):
    """Long replies are good."""
    return len(response) / 10


def even(prompt, response, facts):
    """To some problems all replies are worth the same, so that their groups say nothing."""
    return len(response) / 10 if facts["answer"] % 2 == 0 else 1.0


def noisy(prompt, response, facts):
    """Draws noise from the global generator."""
    return len(response) / 10 + float(torch.rand(()))


def flat(prompt, response, facts):
    """Every reply is worth the same."""
    return 0.0


def picky(prompt, response, facts):
    """Judges replies of even length only."""
    if len(response) % 2:
        raise ValueError("an odd number of letters")
    return len(response) / 10


def speechless(prompt, response, facts):
    """Judges nothing."""
    raise ValueError("no words")


def patient(prompt, response, facts):
    """Nothing can be said of replies to some problems, and replies to the others vary."""
    if facts["answer"] % 2:
        raise ValueError("an odd answer")
    return len(response) / 10


def brief(prompt, response, facts):
    """The shorter the better."""
    return -len(response) / 10


def noisy_flat(prompt, response, facts):
    """Noise from the global generator, and nothing else."""
    return float(torch.rand(()))


def digits(prompt, response, facts):
    """More kinds of letters are better."""
    return len(set(response)) / 10


def observed(prompt, response, facts):
    """Counts what an environment has answered."""
    return response.count("Observation") + len(response) / 1000

"""Environments by name: what answers the policy between its turns. `react` gives it tools."""

from trimtab.environments.react import ReAct

__all__ = ["ReAct"]

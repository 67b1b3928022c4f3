"""Watches a policy while it trains, by a measure that training does not see, and acts when the measure falls. What the
stages share; each adds what is its own (`stages/online/guard.py`, `stages/preference_guard.py`)."""

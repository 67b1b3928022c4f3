"""Watches a policy while it trains, by a measure that training does not see, and acts when the measure falls."""

"""Held-out evaluation: metrics, a comparison of policies, a report."""

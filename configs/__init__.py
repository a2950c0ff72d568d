"""Shipped configurations, read by name with importlib.resources (space/records.py)."""

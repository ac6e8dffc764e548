"""Measurements of what the README claims; each module prints a table."""

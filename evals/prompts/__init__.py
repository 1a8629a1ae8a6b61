"""Prompt sets, one JSON object a line: data only."""

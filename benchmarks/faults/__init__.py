"""Faults that are injected into runs and their files."""

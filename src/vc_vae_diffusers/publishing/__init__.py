"""Folders that others can load, and their cards."""

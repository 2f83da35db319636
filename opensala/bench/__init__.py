"""Measurements against other models. On top of everything but the command line."""

"""Serving engines: many requests at once, each at its own scale."""

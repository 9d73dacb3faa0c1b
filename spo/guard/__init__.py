"""Tells whether a run is healthy, and which epoch to ship: judges, pixels, verdict."""

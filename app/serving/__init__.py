"""Tuned weights behind a server's request."""

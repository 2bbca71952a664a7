"""Profiled steps, and what they say of computing and communicating."""

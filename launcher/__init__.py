"""Decides and drives: compose, decode, plan, freeze, run."""

__version__ = "0.1.0"

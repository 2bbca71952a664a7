"""An environment for each engine: which there are, how they are built, and which Python runs a strategy."""

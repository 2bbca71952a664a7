"""Configuration data: one group a folder, plain YAML, no code."""

"""Whether nodes are sound before a run starts on them: what each shows, and a verdict by node."""

"""What trains in the workers: one rank, its loop, its saves. Never composes, never plans."""

"""Where finished steps go besides metrics.jsonl."""

"""The answer as text: the ranking, why one plan wins, and what would change that."""

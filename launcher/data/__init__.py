"""From documents to micro-batches: tokenised once, memory-mapped, resumable by sample count."""

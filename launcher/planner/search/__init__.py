"""Which plan is best, exactly, and for which goal."""

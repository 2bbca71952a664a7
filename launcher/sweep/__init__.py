"""A sweep: points that can be, one run directory each in one folder, and what they measured against the prediction."""

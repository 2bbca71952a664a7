"""Ways to start the workers of a frozen run: pure builders of argv and environment."""

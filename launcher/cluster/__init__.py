"""Hardware as data, and how to find out what this machine is."""

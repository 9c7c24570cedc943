"""The only SQL. Torch-free, so a command line over it starts at once."""

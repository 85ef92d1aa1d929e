"""Training: one run, several of them, and the commands that ask for these."""

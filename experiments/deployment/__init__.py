"""Trained networks in files, and what they are good for."""

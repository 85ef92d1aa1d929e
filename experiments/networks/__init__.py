"""The networks, and how they are measured."""

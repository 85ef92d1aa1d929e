"""What the methods of `stam_jax` are worth: networks, data, training, tables and pictures."""

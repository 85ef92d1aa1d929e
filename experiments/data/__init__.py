"""Image sets: where they come from, how they are read, and the devices that they lie on."""

"""Files, devices and time: the floor that runs things and never differentiates."""

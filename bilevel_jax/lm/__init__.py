"""Text in, per-example numbers out. Flax is fenced in here; nothing on this floor sees an optimiser."""

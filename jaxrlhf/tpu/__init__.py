"""TPU slices by all of their names, and what their chips can do."""

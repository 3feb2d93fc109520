"""Students as C99."""

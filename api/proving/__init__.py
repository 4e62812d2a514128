"""`holdfast prove isolation`: shows on the running system what crosses between sessions, and what does not."""

"""`softinv`: files in, files out."""

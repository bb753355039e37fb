"""Every example behind one averaged gradient; see docs/batches.md."""

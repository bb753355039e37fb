"""From labels and features back to the images; see docs/images.md and docs/matching.md."""

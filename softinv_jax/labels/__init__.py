"""From the gradient of one example to its label, feature and verdict; see docs/uniqueness.md."""

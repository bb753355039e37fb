"""What the observer sees: the head, its gradient, and what an update says of it."""

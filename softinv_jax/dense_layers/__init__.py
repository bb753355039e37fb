"""Whole batches from any dense layer: the layer's own inputs, of more examples than there are classes."""

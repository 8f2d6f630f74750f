"""Target-Selective Gradient Backprop: which pixels of an image speak for a class."""

"""Known porting mistakes, each made in a copy of PyTorch's sub-module to see if it reproduces Flax's outputs."""

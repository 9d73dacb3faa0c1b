"""A captioned world of coloured shapes in which the whole method can be seen to work on a CPU."""

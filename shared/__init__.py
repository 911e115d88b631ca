"""What both stages must agree on. Imports neither `preprocess` nor `train`."""

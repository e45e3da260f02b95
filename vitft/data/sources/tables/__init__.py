"""Tables of text: a row for each image, with its path and its label."""

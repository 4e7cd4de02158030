"""Which blocks can go: the sweep that scores sets of blocks, and strategies that choose them."""

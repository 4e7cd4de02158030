"""How fast a model runs, and where it runs at all."""

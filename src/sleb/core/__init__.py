"""What every other part builds on; needs no torch."""

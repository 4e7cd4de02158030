"""What other tools take: their plans, quantized weights, a hub's repository."""

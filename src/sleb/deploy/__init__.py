"""What a plan and its checkpoint are turned into for others to run, and back."""

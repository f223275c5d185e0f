"""What is kept, the model made of it, and both on disk: plan, compact, save and load."""

"""What comes in: the model, the task file, a model's own answers."""

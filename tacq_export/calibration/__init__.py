"""What the task says about the model: gradients, Hessians, predicted losses."""

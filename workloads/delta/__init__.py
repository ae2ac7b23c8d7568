"""New items for a bundle that is being served, without retraining."""

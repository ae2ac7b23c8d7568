"""What may leave home, brought to the data bucket whole, in parts and again after any interruption."""

"""The job that turns trained models into a bundle, or refuses to."""

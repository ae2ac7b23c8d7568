"""One file a model, the metrics, and the traditional recommenders. Knows no server."""

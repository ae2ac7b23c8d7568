"""The immutable directory that carries everything a site serves from. Knows no model and no server."""

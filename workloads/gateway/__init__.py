"""The service at a site's edge: one request in, one answer out, whatever has failed."""

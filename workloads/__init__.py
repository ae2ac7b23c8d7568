"""What runs at the two sites: data, models, bundles and the services that serve them."""

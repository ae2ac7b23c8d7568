"""The IPsec connections between private sites and cloud sites: planned, declared, rendered for the private router."""

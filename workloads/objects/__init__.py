"""The one door to the object store, and its fakes. Knows buckets and keys, and nothing of what lies in them."""

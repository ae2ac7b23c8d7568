"""Who a person is at home and what may be said about them elsewhere: keys, pseudonyms, column policy, audit log."""

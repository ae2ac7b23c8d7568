"""New items without training: rows of a shop's file to a delta on top of a bundle, signed and on the channel."""

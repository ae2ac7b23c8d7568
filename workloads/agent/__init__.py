"""The process that brings a bundle into a site's Triton and keeps it there."""

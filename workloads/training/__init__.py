"""The job that trains towers and ranker on a prepared data set and measures them."""

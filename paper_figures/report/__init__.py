"""One page that holds everything a colleague needs to judge a set of runs."""

"""The checks of `vft doctor`: each is a function check_*(...) that yields findings."""

"""One module a task: how a sample becomes a conversation and how answers are scored. The loop is `vft.train`."""

"""Learning: records, examples, loss, and the loop around them."""

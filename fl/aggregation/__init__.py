"""From the adapters of a round's replies to the next adapter of all sites."""

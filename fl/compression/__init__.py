"""Updates of an adapter in few bytes, between the server and its sites."""

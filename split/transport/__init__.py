"""Transports between a client and its shards: in process, over TCP, over torch RPC."""

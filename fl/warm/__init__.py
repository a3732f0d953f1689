"""A site that stays warm: a worker beside its SuperNode keeps model and data between the messages of a federation."""

"""Every value of the lab, as Hydra YAML (a package, so that installed entry points find it)."""

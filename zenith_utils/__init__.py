"""Floor 0: what every Zenith component shares and nothing that is specific to one of them."""

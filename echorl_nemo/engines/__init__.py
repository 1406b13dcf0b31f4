"""Where the method meets a host. Engines never import each other."""

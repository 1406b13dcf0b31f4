"""The engines that run the method: the native one and two hosts. Engines never import each other."""

"""Other programs' protocols, on the same port: each module returns a router of its own routes."""

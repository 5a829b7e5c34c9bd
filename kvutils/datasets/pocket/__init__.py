"""The generated world and its twins of the public data sets: the default profile, without network."""

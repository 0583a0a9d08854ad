"""Everything Leveret needs to run on one machine: private servers on loopback, and the processes around them."""

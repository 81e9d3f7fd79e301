"""Side by side with the limit of the machine and with peers: `make bench`."""

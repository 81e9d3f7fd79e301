"""What lies between Python and the C extension: the tables that its calls read."""

"""What ckptengine uses of numcodecs, over the system's libzstd: for machines that have no wheel of it."""

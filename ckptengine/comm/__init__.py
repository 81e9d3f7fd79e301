"""Coordination between ranks: single process, torch.distributed, and the key-value stores below them."""

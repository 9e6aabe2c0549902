"""Measurements that support the documentation's claims: run from a checkout, not in the wheel."""

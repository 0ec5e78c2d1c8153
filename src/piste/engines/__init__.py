"""Engines run plans. Each module holds one; :mod:`piste.execution` chooses among them."""

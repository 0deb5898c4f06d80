"""Bytes that can be fetched again: catalogues, origins, chunk store, manifests."""

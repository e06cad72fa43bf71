"""Blobs that need secrets to be had, as a store or a service would ask for them."""

from blobs import Blobs


class Keyed(Blobs):
    """A job whose arguments are secret."""

    def __init__(self, api_key, db_password, **others):
        super().__init__(**others)
        assert api_key and db_password

"""WHERE it runs, and what happens when it breaks. Ray only in `ray_*.py`."""

"""Example jobs: copy one to begin your own."""
